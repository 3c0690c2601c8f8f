// What is wrong with the page as it is shown now, for people who hear it, see little of
// it, or touch it with a finger. Run in the page by test_page_access.py.

const shown = (one) => one.checkVisibility();
const told = (one) => one.outerHTML.slice(0, 120);

// Each control has a name, each id is there once and is there at all.
function faults() {
  const found = [];
  const named = (one) =>
    one.getAttribute("aria-label") || one.innerText?.trim() || one.labels?.[0]?.innerText;
  const controls =
    "button, a[href], input, select, textarea, nav, aside, table," +
    "[role=img], [role=meter], [role=progressbar], [role=region], [role=log]";
  for (const one of [...document.querySelectorAll("body *")].filter(shown)) {
    if (one.matches(controls) && !one.closest("[aria-hidden=true]") && !named(one)) {
      found.push(`no name: ${told(one)}`);
    }
    if (one.matches("img") && !one.hasAttribute("alt")) found.push(`no alt: ${told(one)}`);
    if (one.matches("th") && !one.innerText.trim()) found.push(`empty: ${told(one)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  found.push(...ids.filter((id, place) => ids.indexOf(id) !== place).map((id) => `twice: ${id}`));
  for (const one of document.querySelectorAll("[aria-describedby], [for]")) {
    const names = one.getAttribute("aria-describedby") ?? one.getAttribute("for");
    found.push(...names.split(" ").filter((id) => !ids.includes(id)).map((id) => `no #${id}`));
  }
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  return found;
}

// Text whose contrast with what is behind it is below 4.5 (WCAG 2.2, 1.4.3).
function faint() {
  const parse = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const linear = (part) =>
    part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) =>
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const one of [...document.querySelectorAll("body *")].filter(shown)) {
    if (one.closest("svg, .unseen, :disabled, .gone, select")) continue;
    const texts = [...one.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
    if (!texts.some((node) => node.data.trim())) continue;
    const above = luminance(parse(getComputedStyle(one).color));
    const below = luminance(ground(one));
    const ratio = (Math.max(above, below) + 0.05) / (Math.min(above, below) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${told(one)}`);
  }
  return found;
}

// What is pressed and is lower than 40 px; links within a line may be.
function small() {
  const pressed =
    "button, input:not([type=checkbox]), select, nav a, a.button, label.button, .check";
  return [...document.querySelectorAll(pressed)]
    .filter((one) => shown(one) && !one.closest(".unseen"))
    .filter((one) => one.getBoundingClientRect().height < 39.5)
    .map((one) => `${one.getBoundingClientRect().height}: ${told(one)}`);
}
