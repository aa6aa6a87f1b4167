"""What runs inside the sandbox: the candidate's process, or the checker's.

Run as a script with nothing but the standard library, `python child.py ROLE LIMITS LIFELINE [FDS]`:

    candidate   executes an untrusted program, then answers calls of its function
    checker     executes the trusted test, in which that function is a proxy

The two share no memory. They exchange messages over two pipes, and values travel as plain data, so
what the test compares are the checker's own objects: a candidate can neither see the test nor reach
the verdict, it can only answer calls, and an answer is right or wrong.

How values travel. None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
range, Fraction and Decimal arrive as themselves, type by type, nested. An instance of a subclass
(a Counter, a namedtuple, a class of the candidate's own) arrives as the builtin value it holds,
without its methods. Any other iterable (a generator, `map`, a deque) arrives as something that can
be iterated and equals nothing but itself; any other object as something that equals nothing but
itself. An exception arrives as the nearest builtin class among its ancestors. A call's arguments
must be of the first kind, else the test ends with TypeError; changes that the candidate makes to
them are not sent back (no test of ours or of HumanEval looks at an argument after the call).

The format is our own, a tag and a length before each value, because `json` knows neither tuples nor
NaN, `marshal` and `pickle` trust their input, and importing `json` doubles the time that this
script takes to start, twice for every check.
"""

import builtins
import os
import resource
import sys
import time

MAX_MESSAGE_BYTES = 4 << 20
MAX_ITEMS = 100_000  # taken from an iterator, which may be endless

CONSTANTS = {b"N": None, b"T": True, b"F": False}
COLLECTIONS: dict[bytes, type] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset}


class Foreign:
    """Stands in the checker for an object that has no plain value; equals only itself."""

    def __init__(self, type_name):
        self.type_name = type_name

    def __repr__(self):
        return f"<{self.type_name}>"


class ForeignIterable(Foreign):
    """Stands for an iterator or another iterable without a plain value."""

    def __init__(self, type_name, items):
        super().__init__(type_name)
        self.items = items

    def __iter__(self):
        return iter(self.items)


class ProtocolError(Exception):
    """The other side sent something that cannot be a message."""


def encode(value, *, strict=False):
    """Return a value as bytes; `strict` refuses what has no plain value."""
    parts: list[bytes] = []
    _encode(value, parts.append, strict)
    return b"".join(parts)


def _encode(value, write, strict):
    def scalar(tag, payload):
        write(b"%b%d:%b" % (tag, len(payload), payload))

    def several(tag, items):
        items = list(items)
        write(b"%b%d:" % (tag, len(items)))
        for item in items:
            _encode(item, write, strict)

    for tag, constant in CONSTANTS.items():
        if value is constant:
            return write(tag)
    if isinstance(value, str):
        return scalar(b"s", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, int):
        # Hexadecimal: decimal digits cost quadratic time and stop at 4,300.
        return scalar(b"i", int.__format__(value, "x").encode())
    if isinstance(value, float):
        return scalar(b"f", float.__repr__(value).encode())
    if isinstance(value, complex):
        return several(b"c", (value.real, value.imag))
    if isinstance(value, bytes):
        return scalar(b"b", bytes.__getitem__(value, slice(None)))
    for tag, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            # The builtin way through it, whatever a subclass says.
            return several(tag, vars(kind)["__iter__"](value))
    if isinstance(value, dict):
        return several(b"d", (part for pair in dict.items(value) for part in pair))
    if type(value) is range:
        return several(b"r", (value.start, value.stop, value.step))
    name = type(value).__name__
    if type(value).__module__ == "fractions" and name == "Fraction":
        return several(b"q", (value.numerator, value.denominator))
    if type(value).__module__ == "decimal" and name == "Decimal":
        return scalar(b"D", str(value).encode())
    if strict:
        raise TypeError(f"an argument of type {name} cannot be handed to the candidate.")
    if not hasattr(type(value), "__iter__"):
        return scalar(b"O", name[:80].encode())
    taken: list[object] = []
    for item in value:
        if len(taken) >= MAX_ITEMS:
            raise MemoryError(f"the function returned an iterator of over {MAX_ITEMS} items.")
        taken.append(item)
    return several(b"I", (name[:80], *taken))


def decode(data):
    """Return the value that `encode` was given.

    Raises:
        ProtocolError: Nothing is encoded like this.
    """
    try:
        value, end = _decode(data, 0)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ProtocolError(f"a message is malformed: {type(error).__name__}.") from error
    if end != len(data):
        raise ProtocolError("a message goes on behind its value.")
    return value


def _decode(data, at):
    """Return the value that begins at a place, and the place behind it."""
    tag = data[at : at + 1]
    at += 1
    if tag in CONSTANTS:
        return CONSTANTS[tag], at
    colon = data.index(b":", at, at + 10)
    size, at = int(data[at:colon]), colon + 1
    if tag in (b"s", b"i", b"f", b"b", b"D", b"O"):
        payload = data[at : at + size]
        if len(payload) != size:
            raise ValueError("cut off")
        return _scalar(tag, payload), at + size
    items = []
    for _ in range(size):  # not allocated in advance: the size may be a lie
        item, at = _decode(data, at)
        items.append(item)
    return _several(tag, items), at


def _scalar(tag, payload):
    if tag == b"b":
        return payload
    text = payload.decode("utf-8", "surrogatepass")
    if tag == b"i":
        return int(text, 16)
    if tag == b"f":
        return float(text)
    if tag == b"O":
        return Foreign(text)
    if tag == b"D":
        from decimal import Decimal

        return Decimal(text)
    return text


def _several(tag, items):
    if tag in COLLECTIONS:
        return COLLECTIONS[tag](items)
    if tag == b"d":
        return dict(zip(items[::2], items[1::2], strict=True))
    if tag == b"c":
        return complex(*items)
    if tag == b"r":
        return range(*items)
    if tag == b"I" and items:
        return ForeignIterable(str(items[0]), items[1:])
    if tag == b"q":
        from fractions import Fraction

        return Fraction(*items)
    raise ValueError("unknown tag")


def frame(message, *, strict=False):
    """Return a message as it is sent: four bytes of length, then the value."""
    data = encode(message, strict=strict)
    return len(data).to_bytes(4) + data


class Channel:
    """Messages over a pair of pipes."""

    def __init__(self, read_fd, write_fd):
        self.read_fd, self.write_fd = read_fd, write_fd

    def send(self, message, *, strict=False):
        """Write one message."""
        rest = memoryview(frame(message, strict=strict))
        while rest:
            rest = rest[os.write(self.write_fd, rest) :]

    def receive(self):
        """Return the next message, None at the end of the stream.

        Raises:
            ProtocolError: It cannot be decoded, or is longer than `MAX_MESSAGE_BYTES`.
        """
        size = int.from_bytes(self._read(4))
        if size > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message is longer than {MAX_MESSAGE_BYTES} bytes.")
        data = self._read(size)
        return decode(data) if size and len(data) == size else None

    def _read(self, size):
        """Return that many bytes, fewer at the end of the stream."""
        data = bytearray()
        while len(data) < size and (more := os.read(self.read_fd, size - len(data))):
            data += more
        return bytes(data)


def describe_exception(error):
    """Return an exception as a reply: its ancestors' names, nearest first, and its text."""
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        text = str(error)[:500]
    except Exception:  # the candidate's own class may fail at this
        text = ""
    return {"raised": names, "text": text}


def rebuild_exception(names, text):
    """Return the nearest builtin exception that takes a text."""
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(str(text))
            except TypeError:  # UnicodeDecodeError and the like take five arguments
                continue
    raise ProtocolError("the candidate raised something that is no exception.")


def load(source, name):
    """Execute a source as the official evaluator does: `__name__` is not `__main__`.

    Returns:
        Its namespace.
    """
    namespace: dict[str, object] = {}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def answer(function, *args, **kwargs):
    """Call a function and return the reply that says what came of it."""
    try:
        # Encoded here: whatever goes wrong in that is the function's doing.
        return {"returned": encode(function(*args, **kwargs))}
    except BaseException as error:  # a foreign program may raise anything
        return describe_exception(error)


def run_candidate(channel):
    """Execute the program that arrives first, then answer calls until the checker hangs up."""
    job = channel.receive()
    functions = []
    reply = answer(
        lambda: functions.append(load(job["program"], "<candidate>")[job["entry_point"]])
    )
    while True:
        channel.send({**reply, "cpu_seconds": time.process_time()})
        reply = None  # it may be large
        call = channel.receive()
        if call is None:
            os._exit(0)  # no exit handlers: they are the candidate's
        reply = answer(*functions, *call["args"], **call["kwargs"])


class EndedError(Exception):
    """The candidate's process went away."""


class Proxy:
    """The candidate's function as the test sees it."""

    def __init__(self, channel):
        self.channel = channel
        self.raised = None
        self.cpu_seconds = 0.0

    def ask(self, message):
        """Send a message and return what the reply holds, or raise what it raised."""
        try:
            self.channel.send(message, strict=True)
            reply = self.channel.receive()
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise EndedError
        if not isinstance(reply, dict) or not isinstance(reply.get("cpu_seconds"), float):
            raise ProtocolError("a reply has not the form of one.")
        self.cpu_seconds = reply["cpu_seconds"]
        if isinstance(reply.get("returned"), bytes):
            return decode(reply["returned"])
        if not isinstance(reply.get("raised"), list):
            raise ProtocolError("a reply has not the form of one.")
        self.raised = rebuild_exception(reply["raised"], reply.get("text"))
        raise self.raised

    def __call__(self, *args, **kwargs):
        """Call the candidate's function in its own process."""
        return self.ask({"args": args, "kwargs": kwargs})


def run_test(job, channel):
    """Run the test against the candidate; return the report, a dict of outcome and detail."""
    proxy = Proxy(channel)
    try:
        proxy.ask({"program": job["program"], "entry_point": job["entry_point"]})
        # The test may call helpers and use imports of the prompt: the trusted ones, not those that
        # the candidate redefined. The function under test itself is always the candidate's.
        namespace = load(job["prompt"], "<prompt>")
        namespace[job["entry_point"]] = proxy
        exec(compile(job["test"], "<test>", "exec"), namespace)
        if "random" in job["test"]:
            import random

            random.seed(0)  # tests that draw inputs draw the same ones every time
        namespace["check"](proxy)
    except EndedError:
        return {"outcome": "ended", "detail": ""}
    except ProtocolError as error:
        return {"outcome": "protocol", "detail": str(error)}
    except AssertionError as error:
        if error is not proxy.raised:
            return {"outcome": "failed", "detail": f"AssertionError: {error}"[:500]}
        return {"outcome": "error", "detail": f"AssertionError: {error}"[:500]}
    except MemoryError as error:
        return {"outcome": "killed", "detail": f"memory limit: {error}"[:500]}
    except BaseException as error:  # what the candidate raised, the proxy raises
        return {"outcome": "error", "detail": f"{type(error).__name__}: {error}"[:500]}
    return {"outcome": "passed", "detail": "", "cpu_seconds": proxy.cpu_seconds}


def is_orphan(lifeline_fd):
    """Tell whether the process that asked for this one is dead; its end of the pipe is closed."""
    os.set_blocking(lifeline_fd, False)
    try:
        return os.read(lifeline_fd, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(lifeline_fd)


def main(role, limits, lifeline_fd, *fds):
    """Lower the limits for good, take the pipes from where the program would look, and begin."""
    if is_orphan(int(lifeline_fd)):
        os._exit(1)
    for limit in limits.split(","):
        name, _, number = limit.partition("=")
        value = int(number)
        kind = getattr(resource, f"RLIMIT_{name}")
        # A second between soft and hard: SIGXCPU ends the honest, SIGKILL those who ignore it.
        resource.setrlimit(kind, (value, value + 1 if name == "CPU" else value))
    os.environ.clear()
    read_fd, write_fd = os.dup(0), os.dup(1)
    os.dup2(2, 0)  # standard error is the null device
    os.dup2(2, 1)
    if role == "candidate":
        run_candidate(Channel(read_fd, write_fd))
    else:
        job = Channel(read_fd, write_fd).receive()
        report = run_test(job, Channel(*map(int, fds)))
        Channel(read_fd, write_fd).send(report)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
