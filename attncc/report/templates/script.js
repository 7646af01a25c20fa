"use strict";
// Without it the page shows the same: masks at their first size, details closed.
for (const figure of document.querySelectorAll("figure.mask")) {
  const image = figure.querySelector("img");
  const first = image.width / image.naturalWidth || 1;
  let scale = first;
  const show = () => {
    image.style.width = `${image.naturalWidth * scale}px`;
    image.style.height = `${image.naturalHeight * scale}px`;
  };
  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const by = { in: 2, out: 0.5 }[button.dataset.zoom];
      scale = by ? Math.min(32, Math.max(0.5, scale * by)) : first;
      show();
    });
  }
  figure.querySelector(".scroll").addEventListener("keydown", (event) => {
    const button = { "+": "in", "=": "in", "-": "out", "0": "fit" }[event.key];
    if (button && !event.ctrlKey && !event.metaKey) {
      figure.querySelector(`[data-zoom="${button}"]`).click();
      event.preventDefault();
    }
  });
}
const open = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
};
window.addEventListener("hashchange", open);
open();
