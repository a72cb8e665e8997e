// The page is complete without this. It adds the read-out under the pointer, and on a page that is served it takes in what is new.
"use strict";
(() => {
  const main = document.querySelector("main");
  let groups = new Map();

  const written = (value, form) => {
    if (form === "percent") return `${Number((value * 100).toPrecision(3))} %`;
    const size = Math.abs(value);
    if (value === Math.trunc(value) && size < 1e7) return value.toLocaleString("en");
    if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
    return value.toLocaleString("en", { minimumSignificantDigits: 4, maximumSignificantDigits: 4 });
  };

  // The last point up to the step, or the next one where that is nearer.
  const nearest = (curve, step) => {
    let low = 0, high = curve.s.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (curve.s[middle] <= step) low = middle; else high = middle - 1;
    }
    return low + 1 < curve.s.length && curve.s[low + 1] - step < Math.abs(step - curve.s[low]) ? low + 1 : low;
  };

  const load = () => {
    groups = new Map();
    for (const script of main.querySelectorAll("script.points")) {
      const panels = main.querySelector(`.panels[data-group="${script.dataset.group}"]`);
      const data = JSON.parse(script.textContent);
      const readings = [...panels.querySelectorAll("[data-curve]")].map((element) => ({ element, said: element.textContent }));
      groups.set(panels, { data, readings });
    }
  };

  const show = (panels, group, step) => {
    const [first, last] = group.data.steps;
    const place = `${(100 * (step - first)) / (last - first)}%`;
    for (const rule of panels.querySelectorAll(".rule")) {
      rule.setAttribute("x1", place);
      rule.setAttribute("x2", place);
    }
    panels.classList.add("read");
    for (const { element } of group.readings) {
      const curve = group.data.curves[element.dataset.curve];
      if (!curve || !curve.s.length) continue;
      const at = nearest(curve, step);
      element.textContent = written(curve.v[at], curve.f);
      element.title = `step ${curve.s[at].toLocaleString("en")}`;
    }
    for (const label of panels.querySelectorAll(".at")) {
      label.setAttribute("x", place);
      label.textContent = Math.round(step).toLocaleString("en");
    }
  };

  const hide = (panels, group) => {
    panels.classList.remove("read");
    for (const { element, said } of group.readings) element.textContent = said;
  };

  let under = null;
  const point = (event) => {
    const plot = event.target.closest && event.target.closest(".frame");
    const panels = plot && plot.closest(".panels");
    if (under && under !== panels) hide(under, groups.get(under));
    under = panels;
    if (!panels) return;
    const box = plot.querySelector("svg.plot").getBoundingClientRect();
    const group = groups.get(panels);
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    show(panels, group, group.data.steps[0] + share * (group.data.steps[1] - group.data.steps[0]));
  };
  main.addEventListener("pointermove", point);
  main.addEventListener("pointerdown", point);
  main.addEventListener("pointerleave", point);
  load();

  // ---- a page that is served: what stands there is replaced when it has changed, and nothing else moves
  if (!main.querySelector(".live")) return;
  let seen = "";
  const refresh = async () => {
    try {
      const answer = await fetch("body", { headers: seen ? { "If-None-Match": seen } : {}, cache: "no-store" });
      // Another command on the same port knows no such address.
      if (answer.status === 404) throw new Error("ended");
      if (answer.status === 200) {
        const body = await answer.text();
        if (!under) {
          const open = [...main.querySelectorAll("details[open]")].map((one) => one.id);
          const scrolled = [...main.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
          const focused = document.activeElement && document.activeElement.id;
          main.innerHTML = body;
          for (const one of main.querySelectorAll("details")) one.open = open.includes(one.id);
          main.querySelectorAll(".scroll").forEach((one, at) => { one.scrollLeft = scrolled[at] || 0; });
          if (focused) document.getElementById(focused)?.focus();
          seen = answer.headers.get("ETag") || "";
          load();
        }
      }
      main.classList.remove("away");
    } catch {
      // So that the whole page comes, and not 304, once the command can be reached again.
      seen = "";
      main.classList.add("away");
      const live = main.querySelector(".live");
      if (live) live.textContent = "The command that served this page has ended; what stands here is what it said last.";
    }
    setTimeout(refresh, document.hidden ? 15000 : 3000);
  };
  setTimeout(refresh, 3000);
})();
