// Sorting, filtering, pages of tables, charts and the theme. Text always goes in as text: nothing
// here makes markup out of data.
"use strict";

(() => {
  const root = document.body.dataset.root;

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in made && key !== "role") made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function data(section) {
    return JSON.parse(section.querySelector("script.data").textContent);
  }

  // --- theme ---------------------------------------------------------------------------------

  const themes = ["auto", "light", "dark"];
  const listeners = [];

  function remembered() {
    try {
      return localStorage.getItem("tokenmark-theme");
    } catch {
      return null; // some browsers keep nothing for pages from a file
    }
  }

  function setTheme(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.querySelector("[data-theme-switch]");
    button.querySelector("span").textContent = theme;
    try {
      localStorage.setItem("tokenmark-theme", theme);
    } catch {
      // as above
    }
    listeners.forEach((listener) => listener());
  }

  function startTheme() {
    const button = document.querySelector("[data-theme-switch]");
    const found = remembered();
    setTheme(themes.includes(found) ? found : "auto");
    button.hidden = false;
    button.addEventListener("click", () => {
      const now = document.documentElement.dataset.theme || "auto";
      setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      listeners.forEach((listener) => listener()),
    );
  }

  // --- sorting -------------------------------------------------------------------------------

  const collator = new Intl.Collator("en", { numeric: true });

  // Values without a number or word stay last in both directions.
  function compare(first, second, direction) {
    const isFirst = first === null || first === "";
    const isSecond = second === null || second === "";
    if (isFirst || isSecond) return isFirst - isSecond;
    const order =
      typeof first === "number" && typeof second === "number"
        ? first - second
        : collator.compare(first, second);
    return direction === "descending" ? -order : order;
  }

  // Makes the heading a button; numbers begin with the largest, words with A.
  function sortButton(heading, sort) {
    const button = element("button", { type: "button" });
    button.append(...heading.querySelector("span").childNodes);
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      for (const each of heading.parentElement.children) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", direction);
      sort(direction);
    });
  }

  function startSortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, place) => {
      const isNumber = heading.classList.contains("number");
      const value = (row) => {
        const cell = row.cells[place];
        const shown = (cell.dataset.sort ?? cell.textContent).trim();
        if (!isNumber) return shown;
        return shown === "" ? null : Number(shown);
      };
      sortButton(heading, (direction) => {
        const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
        rows.sort((first, second) => compare(first[0], second[0], direction));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  // --- results -------------------------------------------------------------------------------

  function chip(word) {
    const kind = word.toLowerCase().replaceAll(" ", "-").replaceAll(/[()]/g, "");
    return element("span", { className: `chip chip-${kind}` }, word);
  }

  function resultRow(row, content) {
    const group = content.groups[row.group];
    const made = element("tr", { className: `role-${row.role}` });
    const name = element("th", { scope: "row" });
    name.append(row.page ? element("a", { href: root + row.page }, row.method) : row.method);
    if (row.role !== "method") name.append(" ", element("span", { className: "role" }, row.role));
    if (row.settings) name.append(element("small", {}, row.settings));
    if (row.status !== "ok") {
      const words = row.error ? `${row.status}: ${row.error}` : row.status;
      name.append(element("small", { className: "trouble" }, words));
    }
    made.append(name);
    if (content.withTask) {
      const link = element("a", { href: root + group.taskPage }, group.task);
      made.append(element("td", { className: "text" }, link));
    }
    content.columns.forEach((column, place) => {
      const cell = row.cells[place];
      const shown = element("td", { className: column.kind });
      if (column.kind === "number" && cell) {
        // The last column leads to the same place by keyboard, in one step instead of twelve.
        const link = { href: `${root}${row.evidence}-${column.key}`, tabIndex: -1 };
        shown.append(element("a", link, cell[1]));
        if (cell[2]) shown.append(element("small", {}, cell[2]));
      } else if (column.kind === "chip" && cell) shown.append(chip(cell));
      else if (column.kind === "text") shown.append(cell);
      made.append(shown);
    });
    const setting = element("td", { className: "setting" }, settingText(group));
    if (group.details) setting.append(element("small", {}, group.details));
    const source = element("a", { href: root + row.evidence }, "SQL, rows");
    made.append(setting, element("td", {}, source));
    return made;
  }

  function settingText(group) {
    return [group.model, group.hardware, group.scenario, group.scale].join(" · ");
  }

  function startGrid(section) {
    const content = data(section);
    const form = section.querySelector("form");
    const table = section.querySelector("table");
    const status = section.querySelector(".status");
    const pages = section.querySelector(".pages");
    const [previous, next] = pages.querySelectorAll("button");
    const verdict = content.columns.findIndex((column) => column.key === "speed_verdict");
    const fields = {
      family: (row) => row.family,
      task: (row) => content.groups[row.group].task,
      model: (row) => content.groups[row.group].model,
      hardware: (row) => content.groups[row.group].hardware,
      scale: (row) => content.groups[row.group].scale,
      setting: (row) => content.groups[row.group].details,
      verdict: (row) => (verdict < 0 ? "" : row.cells[verdict]),
    };
    content.rows.forEach((row) => {
      row.found = `${row.method} ${row.settings}`.toLowerCase();
    });
    let rows = content.rows;
    let shown = rows;
    let page = 0;

    function draw() {
      const size = Number(pages.querySelector("select").value);
      const last = Math.max(0, Math.ceil(shown.length / size) - 1);
      page = Math.min(page, last);
      const chosen = shown.slice(page * size, (page + 1) * size);
      table.tBodies[0].replaceChildren(...chosen.map((row) => resultRow(row, content)));
      const all = content.rows.length;
      status.textContent =
        shown.length === all ? `${all} results` : `${shown.length} of ${all} results`;
      pages.hidden = all <= 50;
      previous.disabled = page === 0;
      next.disabled = page === last;
      pages.querySelector("span").textContent = `Page ${page + 1} of ${last + 1}`;
    }

    function filter() {
      const words = form.elements.method.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = Object.entries(fields).flatMap(([name, field]) => {
        const chosen = form.elements[name]?.value;
        return chosen ? [[field, JSON.parse(chosen)]] : [];
      });
      shown = rows.filter(
        (row) =>
          words.every((word) => row.found.includes(word)) &&
          wanted.every(([field, value]) => field(row) === value),
      );
      page = 0;
      draw();
    }

    for (const [name, field] of Object.entries(fields)) {
      const select = form.elements[name];
      if (!select) continue;
      const values = [...new Set(rows.map(field))].sort(collator.compare);
      // The value is JSON, so that "" is no filter and an empty name is still one.
      select.append(element("option", { value: "" }, "all"));
      for (const value of values) {
        select.append(element("option", { value: JSON.stringify(value) }, value || "none"));
      }
      // With one value there is nothing to choose; family, hardware and scale always say what it is.
      const isAlways = ["family", "hardware", "scale"].includes(name);
      select.closest("label").hidden = values.length < 2 && !isAlways;
    }
    for (const heading of table.tHead.rows[0].cells) {
      const key = heading.dataset.key;
      if (!key) continue;
      const place = content.columns.findIndex((column) => column.key === key);
      const value = (row) => {
        if (key === "method") return `${row.method} ${row.settings}`;
        if (key === "task") return content.groups[row.group].task;
        if (key === "setting") return settingText(content.groups[row.group]);
        const cell = row.cells[place];
        return Array.isArray(cell) ? cell[0] : cell;
      };
      sortButton(heading, (direction) => {
        const keyed = content.rows.map((row) => [value(row), row]);
        keyed.sort((first, second) => compare(first[0], second[0], direction));
        rows = keyed.map(([, row]) => row);
        filter();
      });
    }
    form.elements.method.addEventListener("input", filter);
    form.addEventListener("change", (event) => {
      if (event.target.tagName === "SELECT") filter();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    previous.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));
    pages.querySelector("select").addEventListener("change", () => turn(0));

    function turn(by) {
      page += by;
      draw();
      table.closest(".scroll").scrollIntoView({ block: "nearest" });
    }

    const filtering = form.closest("details");
    filtering.hidden = false;
    filtering.open = matchMedia("(min-width: 40rem)").matches;
    draw();
  }

  // --- charts --------------------------------------------------------------------------------

  let library = null;

  // The library is large, so it is read when the first chart comes near.
  function loadLibrary(path) {
    library ??= new Promise((resolve, reject) => {
      const script = element("script", { src: path });
      script.addEventListener("load", () => resolve(window.Plotly));
      script.addEventListener("error", () => reject(new Error("the chart library is missing")));
      document.head.append(script);
    });
    return library;
  }

  // A property's own value names both schemes; only where it colours something is one chosen.
  const sample = element("i", { hidden: "" });

  function colour(name) {
    sample.style.color = `var(--${name})`;
    if (!sample.isConnected) document.body.append(sample);
    return getComputedStyle(sample).color;
  }

  // The library reads its texts as a little HTML.
  function escaped(words) {
    return words.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  const standings = {
    front: { name: "on the front", symbol: "circle" },
    undecided: { name: "undecided: intervals overlap", symbol: "diamond-open" },
    dominated: { name: "dominated", symbol: "x-thin-open" },
  };

  function reach(points, axis) {
    const known = (value, end) => (end === null ? 0 : Math.abs(end - value));
    return {
      type: "data",
      symmetric: false,
      array: points.map((point) => known(point[axis][0], point[axis][2])),
      arrayminus: points.map((point) => known(point[axis][0], point[axis][1])),
      thickness: 1,
      width: 3,
    };
  }

  function trace(points, options) {
    return {
      x: points.map((point) => point.x[0]),
      y: points.map((point) => point.y[0]),
      customdata: points.map((point) => point.evidence),
      text: points.map(
        (point) =>
          `<b>${escaped(point.label)}</b><br>cost ${escaped(point.shown[0])}` +
          `<br>quality ${escaped(point.shown[1])}` +
          (point.rival ? `<br>${point.standing}: ${escaped(point.rival)}` : ""),
      ),
      hoverinfo: "text",
      error_x: { ...reach(points, "x"), color: options.color },
      error_y: { ...reach(points, "y"), color: options.color },
      type: "scatter",
      ...options,
    };
  }

  function traces(axis, method) {
    const found = [];
    for (const [standing, { name, symbol }] of Object.entries(standings)) {
      const points = axis.points.filter((point) => point.standing === standing);
      if (!points.length) continue;
      const color = colour(standing);
      found.push(
        trace(points, {
          name,
          mode: "markers",
          color,
          opacity: standing === "dominated" ? 0.8 : 1,
          marker: { color, symbol, size: standing === "front" ? 10 : 9, line: { width: 2 } },
        }),
      );
    }
    const line = axis.points.filter((point) => point.method === method);
    if (line.length) {
      line.sort((first, second) => first.x[0] - second.x[0]);
      const color = colour("ink");
      found.push({
        ...trace(line, { name: escaped(method), mode: "lines", color }),
        error_x: {},
        error_y: {},
        line: { color, width: 1.5 },
        hoverinfo: "skip",
      });
    }
    for (const each of found) delete each.color;
    return found;
  }

  // Names of the points that matter, where there are few enough to be read.
  function names(axis, method) {
    const counts = new Map();
    for (const point of axis.points) counts.set(point.method, (counts.get(point.method) ?? 0) + 1);
    const name = (point) => (counts.get(point.method) > 1 ? point.label : point.method);
    const short = (words) => (words.length > 28 ? `${words.slice(0, 27)}…` : words);
    const wanted = axis.points.filter((point) =>
      method ? point.method === method : point.standing === "front",
    );
    if (wanted.length > 9) return [];
    const middle = axis.points.map((point) => point.x[0]).sort((a, b) => a - b);
    const half = middle[Math.floor(middle.length / 2)];
    return wanted.map((point) => ({
      x: Math.log10(point.x[0]),
      y: point.y[0],
      text: escaped(short(name(point))),
      showarrow: false,
      xanchor: point.x[0] > half ? "right" : "left",
      xshift: point.x[0] > half ? -9 : 9,
      yshift: 11,
      font: { size: 11, color: colour("ink") },
    }));
  }

  function layout(chart, axis, method) {
    const line = colour("line");
    const values = axis.points.flatMap((point) => point.x).filter((value) => value > 0);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = Math.max(1.05, (high / low) ** 0.06);
    const common = { gridcolor: line, zeroline: false, linecolor: line, automargin: true };
    return {
      font: { family: "system-ui, sans-serif", size: 12, color: colour("muted") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 55, r: 12, t: 12, b: 50 },
      hovermode: "closest",
      hoverlabel: {
        bgcolor: colour("ground"),
        bordercolor: line,
        font: { color: colour("ink") },
        align: "left",
      },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      xaxis: {
        ...common,
        title: { text: escaped(axis.label) },
        type: "log",
        range: [Math.log10(low / room), Math.log10(high * room)],
        tickvals: ticks(low / room, high * room),
        ticktext: ticks(low / room, high * room).map(String),
      },
      yaxis: {
        ...common,
        title: { text: escaped(`${chart.metric}: difference from the baseline`) },
        // Better is always up.
        autorange: chart.higherIsBetter ? true : "reversed",
      },
      annotations: names(axis, method),
      shapes: [
        { type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: line, width: 1 } },
        { type: "line", y0: 0, y1: 0, xref: "paper", x0: 0, x1: 1, line: { color: line, width: 1 } },
      ],
    };
  }

  // Round ratios, as many as a small screen has room for.
  function ticks(low, high) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const digit of [1, 1.5, 2, 3, 5, 7]) all.push(Number((digit * 10 ** power).toPrecision(2)));
    }
    let inside = all.filter((value) => value >= low && value <= high);
    if (inside.length < 3) {
      const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((each) => (high - low) / each <= 6) ?? 1;
      inside = [];
      for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
        inside.push(Number(value.toFixed(2)));
      }
    }
    const every = Math.ceil(inside.length / 9);
    return inside.filter((value, place) => place % every === 0 || value === 1);
  }

  function pointTable(chart, axis) {
    const words = ["method", axis.label, `${chart.metric} vs baseline`, "standing", "because of"];
    const head = element("tr");
    words.forEach((word, place) => {
      const heading = element("th", { scope: "col" }, element("span", {}, word));
      if (place === 1 || place === 2) heading.classList.add("number");
      head.append(heading);
    });
    const body = element("tbody");
    for (const point of axis.points) {
      const link = element("a", { href: root + point.evidence }, point.label);
      body.append(
        element(
          "tr",
          {},
          element("th", { scope: "row" }, link),
          element("td", { className: "number", "data-sort": point.x[0] }, point.shown[0]),
          element("td", { className: "number", "data-sort": point.y[0] }, point.shown[1]),
          element("td", {}, chip(point.standing)),
          element("td", {}, point.rival),
        ),
      );
    }
    const caption = element("caption", { className: "unseen" }, `${chart.title}, ${axis.label}`);
    const table = element("table", {}, caption, element("thead", {}, head), body);
    startSortable(table);
    const label = { className: "scroll", role: "region", tabIndex: 0, "aria-label": "Points" };
    return element("div", label, table);
  }

  function explain(chart, axis) {
    const direction = axis.moreIsBetter ? "Right" : "Left";
    const margin = axis.margin
      ? ` Memory has no interval; values closer than ${axis.margin} count as the same.`
      : "";
    const hidden = axis.hidden ? ` ${axis.hidden} further points are not drawn.` : "";
    return (
      `${direction} and up is better. Whiskers are 95% intervals of the comparison with the ` +
      "baseline on the same items. A point is dominated if another is at least as good in both " +
      "and better in one wherever in their intervals the truth lies; undecided if the values say " +
      `so and the intervals overlap.${margin}${hidden}`
    );
  }

  function startCharts(section) {
    const drawn = data(section);
    const select = section.querySelector("[name=chart]");
    const buttons = section.querySelector(".axes");
    const place = section.querySelector(".chart");
    const method = section.dataset.method;
    const shortNames = { speed: "Speed", decode: "Decoding speed", memory: "Memory" };
    let wanted = "speed";
    let isNear = false;

    async function draw() {
      const chart = drawn[Number(select.value)];
      const axis = chart.axes.find((each) => each.name === wanted) ?? chart.axes[0];
      buttons.replaceChildren(
        ...chart.axes.map((each) => {
          const button = element("button", { type: "button" }, shortNames[each.name]);
          button.setAttribute("aria-pressed", String(each === axis));
          button.addEventListener("click", () => {
            wanted = each.name;
            draw();
            buttons.querySelector("[aria-pressed=true]").focus();
          });
          return button;
        }),
      );
      section.querySelector(".explained").textContent = explain(chart, axis);
      section.querySelector(".points > div").replaceChildren(pointTable(chart, axis));
      if (!isNear) return;
      try {
        const plotly = await loadLibrary(section.dataset.library);
        const options = { displayModeBar: false, responsive: true };
        await plotly.react(place, traces(axis, method), layout(chart, axis, method), options);
        place.removeAllListeners?.("plotly_click");
        place.on("plotly_click", (event) => {
          location.href = root + event.points[0].customdata;
        });
        place.dataset.drawn = axis.name;
      } catch (error) {
        place.textContent = `This chart could not be drawn: ${error.message}.`;
      }
    }

    section.querySelector(".filters").hidden = false;
    select.closest("label").hidden = drawn.length < 2;
    select.addEventListener("change", draw);
    listeners.push(draw);
    draw();
    const watcher = new IntersectionObserver(
      (entries) => {
        if (!entries.some((entry) => entry.isIntersecting)) return;
        watcher.disconnect();
        isNear = true;
        draw();
      },
      { rootMargin: "300px" },
    );
    watcher.observe(place);
  }

  // --- the rest ------------------------------------------------------------------------------

  function startCopy(button) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "Copied";
    });
  }

  startTheme();
  document.querySelectorAll("table.sortable").forEach(startSortable);
  document.querySelectorAll("section.grid").forEach(startGrid);
  document.querySelectorAll("section.charts").forEach(startCharts);
  document.querySelectorAll("button.copy").forEach(startCopy);
})();
