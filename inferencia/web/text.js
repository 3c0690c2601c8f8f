// Makes elements out of data.
//
// Whatever comes from outside (names, log lines, answers) becomes text nodes and never
// markup; the page's policy (Trusted Types) would refuse anything else. Characters that
// cannot be seen, or that change the order of others, are shown as what they are.

const SVG = "http://www.w3.org/2000/svg";

// C0 but tab and line feed, DEL and C1, and the embeddings, overrides and isolates that
// reorder what stands around them (Trojan Source, CVE-2021-42574).
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
// In a name also line ends, invisible characters, and lone surrogates.
const HIDDEN_IN_NAMES =
	/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function shown(character) {
	const code = character.codePointAt(0);
	if (code < 0x20 || code === 0x7f) return `^${String.fromCharCode(code ^ 0x40)}`; // as cat -v
	return `<U+${code.toString(16).toUpperCase().padStart(4, "0")}>`;
}

/** Text of one or more lines, with nothing hidden in it. */
export const visible = (text) => String(text).replace(HIDDEN, shown);

/** A name: one line, with nothing hidden in it. */
export const inline = (text) => String(text).replace(HIDDEN_IN_NAMES, shown);

/**
 * An element. `attributes` may have `on` (listeners by event) besides; `value`,
 * `checked`, `disabled` and the like are set as properties. Children that are null or
 * false are left out.
 */
export function el(tag, attributes = {}, ...children) {
	return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
	return filled(document.createElementNS(SVG, tag), attributes, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected"]);

function filled(node, attributes, children) {
	for (const [name, value] of Object.entries(attributes)) {
		if (name === "on") {
			for (const [event, listener] of Object.entries(value)) {
				node.addEventListener(event, listener);
			}
		} else if (PROPERTIES.has(name)) {
			node[name] = value;
		} else if (value !== null && value !== undefined && value !== false) {
			node.setAttribute(name, value === true ? "" : value);
		}
	}
	for (const child of children.flat(2)) {
		if (child === null || child === undefined || child === false) continue;
		node.append(child instanceof Node ? child : visible(child));
	}
	return node;
}

/** A button that does something. */
export const simpleButton = (label, click, further = { class: "plain" }) =>
	el("button", { type: "button", ...further, on: { click } }, label);

/** For fields whose text is no prose. */
export const VERBATIM = { autocomplete: "off", spellcheck: "false", autocapitalize: "none" };

/** A name that came from outside, kept apart from the direction of its surroundings. */
export const named = (text, further = {}) => el("bdi", further, inline(text));

/** Set the text of an element, and touch nothing if it says that already. */
export function say(node, text) {
	const wanted = visible(text ?? "");
	if (node.textContent !== wanted) node.textContent = wanted;
}

/** Replace all children. */
export function fill(node, ...children) {
	node.replaceChildren();
	return filled(node, {}, children);
}

/** Set an attribute, and touch nothing if it is so already; null takes it off. */
export function mark(node, name, value) {
	if (value === null || value === undefined || value === false) {
		if (node.hasAttribute(name)) node.removeAttribute(name);
	} else if (node.getAttribute(name) !== String(value)) {
		node.setAttribute(name, value);
	}
}
