// Where the key is asked for, once.

import { snippet } from "../press.js";
import { el, say } from "../text.js";

export function entrance({ enter, reason }) {
	const input = el("input", { type: "password", id: "key", name: "key", autocomplete: "current-password",
		spellcheck: "false", autocapitalize: "none", "aria-describedby": "key-hint key-error" });
	const error = el("p", { class: "bad", id: "key-error", role: "alert" }, reason);
	const button = el("button", { type: "submit", class: "strong" }, "Open");
	// Password managers look for a name beside it.
	const name = el("input", { class: "unseen", name: "username", autocomplete: "username", value: "inferencia", tabindex: "-1", "aria-hidden": "true" });
	const form = el("form", { class: "entrance" }, name,
		el("h1", {}, "Which key is yours?"),
		el("label", { for: "key" }, "API key"),
		el("div", { class: "row" }, input, button),
		error,
		el("p", { class: "hint", id: "key-hint" },
			"It stays in this tab and is gone when the tab is closed. With a key of the role admin you see and steer everything; with any other your own usage and the playground."),
		el("p", { class: "hint" }, "Without a configuration, the first start has made one of each. This shows the admin's:"),
		snippet("cat ~/.local/state/inferencia/admin-key", "Where the administrator's key is"));
	form.addEventListener("submit", async (event) => {
		event.preventDefault();
		button.disabled = true;
		say(error, "");
		try {
			await enter(input.value.trim());
		} catch (problem) {
			say(error, problem.message);
			input.setAttribute("aria-invalid", "true");
			button.disabled = false;
			input.select();
		}
	});
	return form;
}
