// Things that are pressed: they show that they work, and what came of it, where they are.
// What cannot be undone asks once, in place.

import { root } from "./api.js";
import * as live from "./live.js";
import { el, fill, say, simpleButton } from "./text.js";

/** Whoever presses twice by mistake has not answered the question, in ms. */
const TOO_SOON = 350;

/** Tell those who listen to the page rather than see it. */
export function announce(text) {
	const said = document.getElementById("said");
	said.textContent = "";
	requestAnimationFrame(() => say(said, text));
}

/**
 * A button with a place for its result beside it.
 *
 * `action` may return a text, which is shown, and may throw, which is shown as well.
 * With `question` it asks first; that may be a function, whose empty answer means that
 * nothing need be asked.
 */
export function press(label, action, { question = "", yes = label, kind = "", title, describe } = {}) {
	const button = el("button", { type: "button", class: kind, title, "aria-label": describe }, label);
	const result = el("span", { class: "result", role: "status" });
	const asked = el("span", { class: "ask", role: "group", hidden: true });
	const node = el("span", { class: "press" }, button, asked, result);

	async function act() {
		button.disabled = true;
		button.setAttribute("aria-busy", "true");
		fill(result);
		result.className = "result";
		try {
			const told = await action();
			if (told) say(result, told);
		} catch (error) {
			if (error.name === "AbortError") return;
			result.className = "result bad";
			say(result, error.message);
		} finally {
			button.disabled = false;
			button.removeAttribute("aria-busy");
		}
	}

	function ask(text) {
		const since = performance.now();
		const close = (focus) => {
			asked.hidden = true;
			button.hidden = false;
			if (focus) button.focus();
		};
		const confirm = el("button", { type: "button", class: kind || "strong" }, yes);
		confirm.addEventListener("click", () => {
			if (performance.now() - since < TOO_SOON) return;
			close(true);
			act();
		});
		const leave = simpleButton("No", () => close(true));
		fill(asked, el("span", { class: "question" }, text), confirm, leave);
		asked.setAttribute("aria-label", text);
		asked.onkeydown = (event) => {
			if (event.key !== "Escape") return;
			event.stopPropagation();
			close(true);
		};
		button.hidden = true;
		asked.hidden = false;
		fill(result);
		confirm.focus();
		announce(text);
	}

	button.addEventListener("click", () => {
		const text = typeof question === "function" ? question() : question;
		if (text) ask(text);
		else act();
	});
	return Object.assign(node, {
		button,
		/** Change what the button says. */
		label(text) {
			say(button, text);
		},
	});
}

/** Copies a text; says so. Works over plain HTTP too, where there is no clipboard. */
export function copyButton(text, label = "Copy") {
	const value = () => (typeof text === "function" ? text() : text);
	return press(label, async () => {
		try {
			await navigator.clipboard.writeText(value());
		} catch {
			const area = el("textarea", { class: "unseen", value: value(), "aria-hidden": "true" });
			document.body.append(area);
			area.select();
			const isDone = document.execCommand("copy");
			area.remove();
			if (!isDone) throw new Error("the browser does not let me; mark it and copy");
		}
		announce("copied");
		return "copied";
	}, { kind: "plain" });
}

/** A command or a snippet with a button that copies it. */
export function snippet(text, label) {
	return el("div", { class: "snippet" },
		el("pre", { tabindex: "0", role: "region", "aria-label": label }, el("code", {}, text)),
		copyButton(text));
}

/** The command line that asks a model, for any shell. */
export function curl(model, key) {
	const { endpoint, config, models } = live.state ?? {};
	model ??= models?.[0]?.id ?? "MODEL";
	// Without a configuration the first start has left the key there.
	const secret = key ?? (config && !config.path ? "$(cat ~/.local/state/inferencia/key)" : "YOUR_KEY");
	const body = JSON.stringify({ model, stream: true, messages: [{ role: "user", content: "Hello!" }] });
	return [
		`curl -N ${endpoint ?? root("v1")}/chat/completions \\`,
		`  -H "Authorization: Bearer ${secret}" \\`,
		`  -d '${body.replace(/'/g, "'\\''")}'`,
	].join("\n");
}

/** Hand the browser a file to save. */
export function save(name, text, type) {
	const address = URL.createObjectURL(new Blob([text], { type }));
	el("a", { href: address, download: name }).click();
	setTimeout(() => URL.revokeObjectURL(address), 1000);
}
