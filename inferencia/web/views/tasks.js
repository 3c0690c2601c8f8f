// Tasks: the named commands of admin.tasks; start, watch, cancel.

import { call, follow as followStream, get, inPath, within } from "../api.js";
import { age, moment, span } from "../format.js";
import * as live from "../live.js";
import { stateMark } from "../marks.js";
import { press, snippet } from "../press.js";
import { el, fill, inline, named, say, simpleButton } from "../text.js";

export const view = { name: "tasks", letter: "t", title: "Tasks", mount };

const MOST_CHARACTERS = 400_000;
const EXAMPLE = `admin:
  tasks:
    update llama.cpp:
      - git -C ~/llama.cpp pull --ff-only
      - cmake --build ~/llama.cpp/build -j --target llama-server
    reboot: systemctl reboot`;

function mount(main, { params, signal }) {
	const list = el("ul", { class: "tasks", "aria-label": "Tasks" });
	const problem = el("p", { class: "bad", role: "alert" });
	const items = new Map();
	main.append(problem, list);

	async function refresh() {
		const { tasks } = await get("tasks", signal);
		if (!tasks.length) {
			fill(list, el("li", { class: "none" },
				el("p", {}, "No task yet. Name commands in the configuration, and they can be started here, without a shell and without anything that could be typed into them:"),
				snippet(EXAMPLE, "Example of tasks")));
			return;
		}
		for (const task of tasks) {
			if (!items.has(task.name)) {
				items.set(task.name, taskItem(task, { signal, refresh, isOpen: params.task === task.name }));
				list.append(items.get(task.name));
			}
			items.get(task.name).update(task);
		}
	}

	const ask = () => refresh().catch((error) => signal.aborted || say(problem, error.message));
	let told = "";
	live.follow(signal, (state) => {
		if (!state) return;
		const now = JSON.stringify(state.tasks ?? []);
		if (now !== told) {
			told = now;
			ask();
		}
		for (const item of items.values()) item.tick();
	});
	if (!live.state) ask();
}

function taskItem(first, { signal, refresh, isOpen }) {
	let task = first;
	let reading = null;
	const is = stateMark(task.state);
	const when = el("span", { class: "hint" });
	const commands = el("ol", { class: "commands" }, (task.commands ?? []).map((command) => el("li", {}, el("code", {}, inline(command)))));
	const output = el("pre", { class: "output", tabindex: "0", role: "log", "aria-label": `Output of ${inline(task.name)}`, hidden: true });
	const start = press("Start", async () => {
		await call("POST", `tasks/${inPath(task.name)}`, {});
		await refresh();
		read();
	}, { question: `Start ${inline(task.name)} on this machine?`, yes: "Yes, start", describe: `Start ${inline(task.name)}` });
	const cancel = press("Cancel", async () => {
		await call("DELETE", `tasks/${inPath(task.name)}`);
		await refresh();
	}, { question: "End it with all that it has started?", yes: "Yes, end it", kind: "danger", describe: `Cancel ${inline(task.name)}` });
	const show = simpleButton("Output", () => (output.hidden ? read() : close()), { class: "plain", "aria-expanded": "false" });
	const node = el("li", {}, el("div", { class: "head" }, el("h2", {}, named(task.name)), is, when, start, cancel, show), commands, output);

	function close() {
		reading?.abort();
		output.hidden = true;
		show.setAttribute("aria-expanded", "false");
	}

	function read() {
		reading?.abort();
		reading = within(signal);
		output.hidden = false;
		show.setAttribute("aria-expanded", "true");
		fill(output);
		let size = 0;
		followStream(`tasks/${inPath(task.name)}/output?follow=1`, {
			signal: reading.signal,
			silence: 0,
			again: () => false,
			told({ data }) {
				const text = JSON.parse(data);
				const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
				output.append(el("span", {}, text.endsWith("\n") ? text : `${text}\n`));
				size += text.length;
				while (size > MOST_CHARACTERS && output.childNodes.length > 1) {
					size -= output.firstChild.textContent.length;
					output.firstChild.remove();
				}
				if (isAtEnd) output.scrollTop = output.scrollHeight;
			},
			lost(error) {
				if (error) output.append(el("span", { class: "bad" }, inline(error.message)));
				else if (!size) output.append(el("span", { class: "hint" }, "it has printed nothing"));
			},
		});
	}

	node.tick = () => {
		const isRunning = task.state === "running";
		const parts = [];
		if (isRunning) parts.push(`for ${age(live.now() - task.began)}`);
		else if (task.ended) parts.push(`${moment(task.ended)}, took ${span(task.ended - task.began)}`);
		if (task.exit_status) parts.push(`exit status ${task.exit_status}`);
		if (task.error) parts.push(inline(task.error));
		if (isRunning && task.commands?.length > 1) parts.push(`command ${task.step} of ${task.commands.length}`);
		say(when, parts.join(" · "));
	};
	node.update = (now) => {
		task = now;
		is.update(now.state);
		start.hidden = now.state === "running";
		cancel.hidden = now.state !== "running";
		show.hidden = now.state === "idle";
		node.tick();
	};
	if (isOpen && task.state !== "idle") read();
	return node;
}
