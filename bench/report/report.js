"use strict";
(function () {
  const source = document.getElementById("figures");
  const figures = JSON.parse(source.textContent);
  const choosers = document.querySelectorAll("select.axis");
  const settings = { displayModeBar: false, responsive: true };

  function draw(axis) {
    for (const chooser of choosers) {
      chooser.value = axis;
    }
    for (const part of document.querySelectorAll("[data-axis]")) {
      part.hidden = part.dataset.axis !== axis;
    }
    for (const place of document.querySelectorAll("[data-panel]")) {
      const figure = figures[place.dataset.panel][axis];
      // Plotly keeps what it is given and changes it, so each drawing gets a copy.
      const copy = JSON.parse(JSON.stringify(figure));
      copy.layout.font.family = getComputedStyle(document.body).fontFamily;
      Plotly.react(place, copy.data, copy.layout, settings);
    }
  }

  // A page of paper is narrower than a window, and plotly does not notice the change by itself.
  function fit(paper) {
    for (const place of document.querySelectorAll("[data-panel]")) {
      const width = place.closest(".panels") ? 310 : 650;
      Plotly.relayout(place, paper ? { autosize: false, width: width } : { autosize: true, width: null });
    }
  }

  window.addEventListener("beforeprint", () => fit(true));
  window.addEventListener("afterprint", () => fit(false));
  for (const chooser of choosers) {
    chooser.addEventListener("change", () => draw(chooser.value));
  }
  draw(source.dataset.headline);
})();
