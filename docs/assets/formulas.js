// Draws the formulas of a page with the KaTeX that is part of the site; material for mkdocs announces each page.
document$.subscribe(function () {
  document.querySelectorAll(".arithmatex").forEach(function (element) {
    var text = element.textContent.trim();
    katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: true });
  });
});
