// Writes a JSON list of the texts of a page that have too little contrast to their background into #contrast.
(function () {
  function parse(color) {
    var numbers = color.match(/[\d.]+/g).map(Number);
    var scale = color.startsWith("color(") ? 255 : 1;
    return numbers.slice(0, 3).map((value) => value * scale).concat(numbers.length > 3 ? numbers[3] : 1);
  }
  function over(top, below) {
    return [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  }
  function luminance(color) {
    var linear = color.slice(0, 3).map((value) => {
      var share = value / 255;
      return share <= 0.04045 ? share / 12.92 : Math.pow((share + 0.055) / 1.055, 2.4);
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }
  function ratio(element) {
    var ancestors = [];
    for (var node = element; node; node = node.parentElement) ancestors.unshift(node);
    var background = [255, 255, 255, 1];
    var opacity = 1;
    ancestors.forEach((node) => {
      var style = getComputedStyle(node);
      opacity *= Number(style.opacity);
      var own = parse(style.backgroundColor);
      background = over([own[0], own[1], own[2], own[3] * opacity], background);
    });
    var text = parse(getComputedStyle(element).color);
    text = over([text[0], text[1], text[2], text[3] * opacity], background);
    var values = [luminance(text), luminance(background)].sort((a, b) => b - a);
    return opacity === 0 ? 21 : (values[0] + 0.05) / (values[1] + 0.05);
  }
  function measure(scheme) {
    document.body.setAttribute("data-md-color-scheme", scheme);
    var low = {};
    var walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    var count = 0;
    while (walker.nextNode()) {
      var element = walker.currentNode.parentElement;
      var isShown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
      if (!walker.currentNode.data.trim() || !isShown || element.closest("script, style, noscript, .katex-mathml")) continue;
      count += 1;
      var value = ratio(element);
      var key = element.tagName.toLowerCase() + "." + element.className;
      if (value < 4.5 && !(key in low)) low[key] = [value.toFixed(2), walker.currentNode.data.trim().slice(0, 40)];
    }
    return { scheme: scheme, count: count, low: low };
  }
  window.addEventListener("load", () => {
    var style = document.createElement("style");
    style.textContent = "* { transition: none !important; animation: none !important; }";
    document.head.append(style);
    setTimeout(() => {
      var report = document.createElement("pre");
      report.id = "contrast";
      report.textContent = JSON.stringify(["default", "slate"].map(measure));
      document.body.append(report);
    }, 500);
  });
})();
