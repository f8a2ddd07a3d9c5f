// The values under the pointer. The page says everything without it.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines), cursor = svg.querySelector(".cursor"), figure = svg.parentNode;
  const tip = figure.appendChild(document.createElement("div"));
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  tip.className = "tip";
  hide();
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / scale;
    const nearest = lines.map((line) => line[2].reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    const x = nearest.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    cursor.setAttribute("x1", x[0]);
    cursor.setAttribute("x2", x[0]);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(document.createTextNode("epoch " + x[1]));
    lines.forEach((line, i) => {
      if (Math.abs(nearest[i][0] - x[0]) > 8) return;
      const row = tip.appendChild(document.createElement("div")), swatch = row.appendChild(document.createElement("span"));
      swatch.className = "swatch run-" + line[1];
      row.append(line[0] + ": " + nearest[i][2]);
    });
    tip.hidden = false;
    const outer = figure.getBoundingClientRect(), left = event.clientX - outer.left;
    tip.style.left = (left > outer.width / 2 ? Math.max(0, left - tip.offsetWidth - 14) : left + 14) + "px";
    tip.style.top = event.clientY - outer.top - tip.offsetHeight / 2 + "px";
  });
}
