"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const chooser = document.getElementById("axis");
  const settings = { displayModeBar: false, responsive: true };

  function draw() {
    for (const place of document.querySelectorAll("[data-panel]")) {
      const figure = figures[place.dataset.panel][chooser.value];
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

  if (chooser) {
    window.addEventListener("beforeprint", () => fit(true));
    window.addEventListener("afterprint", () => fit(false));
    chooser.addEventListener("change", draw);
    draw();
  }
})();
