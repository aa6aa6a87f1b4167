"""Tasks of lm-eval over local data, one of each kind, in the language of the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = 6

_DATA = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: data.jsonl
test_split: test
metadata:
  version: 2.0
"""
_TASKS = {
    "tiny_choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_write": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["t5"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: first
    filter: [{function: regex, regex_pattern: "(t[0-9]+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_cloze": """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "tiny_code": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
unsafe_code: true
""",
    "tiny_votes": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
repeats: 3
""",
}


def write_tasks(folder: Path) -> str:
    """Write the tasks and their data; return the folder."""
    documents = []
    for number in range(DOCUMENTS):
        # The last question and the last texts are longer than the tiny models' 256 positions.
        words = 3 if number < DOCUMENTS - 1 else 300
        documents.append(
            {
                "question": _words(words, number),
                "answer": _words(2, number + 40),
                "choices": [_words(length, 7 * number + length) for length in (1, 1, 2, 3)],
                "label": number % 4,
                "text": _words(4 + 90 * number, 5 * number),
            }
        )
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    for name, text in _TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{_DATA}{text}")
    (folder / "tiny.yaml").write_text("group: tiny\ntask: [tiny_choice, tiny_write]\n")
    return str(folder)


def _words(number: int, start: int) -> str:
    return " ".join(f"t{(start * 31 + place * 17) % 90 + 2}" for place in range(number))
