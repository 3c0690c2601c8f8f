// The playground: chat with any model, and see how fast it is.
//
// It uses the same address as everybody, with the key of this tab. What was said stays
// while the page is open, also when another view is looked at.

import { ask, eventsOf, root } from "../api.js";
import { plural, rate, span, whole } from "../format.js";
import * as live from "../live.js";
import { announce, curl, snippet } from "../press.js";
import { keep } from "../router.js";
import { el, fill, inline, mark, named, say, simpleButton } from "../text.js";

export const view = { name: "playground", letter: "p", title: "Playground", forUsers: true, mount };

/** As an engine takes it in one request; also what fits into server.max_body. */
const MOST_IMAGE_BYTES = 12 * 2 ** 20;

const PARAMETERS = [
	["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
	["top_p", "Top p", { min: 0, max: 1, step: 0.05 }],
	["max_tokens", "Most tokens", { min: 1, step: 1 }],
	["seed", "Seed", { step: 1 }],
];

// What was said: {role, content, images: [data URL], thought, stats, failed}
let conversation = [];
let forgotten = null;
let draft = { text: "", images: [] };

function mount(main, { params, signal }) {
	let running = null;
	signal.addEventListener("abort", () => running?.abort());

	const talk = el("div", { class: "talk", role: "log", "aria-label": "Conversation" });
	const model = modelField(params);
	const system = el("textarea", { id: "system", rows: 3, value: params.system ?? "" });
	system.addEventListener("change", () => keep({ system: system.value }));
	const inputs = PARAMETERS.map(([name, label, range]) => {
		const input = el("input", { type: "number", id: `p-${name}`, value: params[name] ?? "", placeholder: "default", ...range });
		input.addEventListener("change", () => keep({ [name]: input.value }));
		return [name, input, el("div", { class: "field" }, el("label", { for: input.id }, label), input)];
	});

	const text = el("textarea", { id: "say", rows: 3, "aria-label": "Message", placeholder: "Say something. Enter sends, Shift Enter begins a new line.", value: draft.text });
	const pictures = el("ul", { class: "pictures", "aria-label": "Images that go with it" });
	const file = el("input", { type: "file", id: "image", accept: "image/*", multiple: true, class: "unseen" });
	const send = el("button", { type: "submit", class: "strong" }, "Send");
	const stop = simpleButton("Stop", () => running?.abort(), { hidden: true });
	const clear = el("button", { type: "button", class: "plain" }, "New chat");
	const told = el("p", { class: "result bad", role: "alert" });
	const form = el("form", { class: "say" }, pictures, text,
		el("p", { class: "tools" }, send, stop, el("label", { class: "button", for: "image" }, "Add an image"), file, clear), told);
	main.append(el("div", { class: "chat" },
		el("section", { class: "said", "aria-label": "Chat" }, talk, form),
		el("section", { class: "settings", "aria-label": "Settings" }, model.node,
			el("details", { open: matchMedia("(min-width: 60rem)").matches }, el("summary", {}, "Parameters"),
				inputs.map(([, , node]) => node),
				el("div", { class: "field" }, el("label", { for: "system" }, "System message"), system)))));

	model.load(signal).then(() => conversation.length || drawAll()).catch((error) => signal.aborted || say(told, error.message));
	drawAll();
	drawPictures();

	// --- what is said -------------------------------------------------------------------

	function drawAll() {
		fill(talk, conversation.length ? conversation.map(drawMessage)
			: el("div", { class: "none" }, el("p", {}, "What you say goes to the model and nowhere else; nothing of it is kept. The same from a terminal:"),
				snippet(curl(model.value || null), "Command that asks a model")));
		if (forgotten) {
			talk.append(el("p", { class: "none" }, "A new chat. ",
				simpleButton("Take the old one back", () => { conversation = forgotten; forgotten = null; drawAll(); })));
		}
	}

	function drawMessage(message) {
		const content = el("p", { class: "content" });
		const thought = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thoughts"), el("p", { class: "content" }));
		const stats = el("p", { class: "stats" });
		const node = el("article", { class: message.role, "aria-label": message.role === "user" ? "You" : "Model" },
			el("h2", {}, message.role === "user" ? "You" : named(message.model ?? "model")), thought, content,
			message.images?.length ? el("p", { class: "pictures" }, message.images.map((address, place) => el("img", { src: address, alt: `Image ${place + 1}` }))) : null,
			message.role === "user" ? null : stats);
		message.draw = () => {
			say(content, message.content);
			thought.hidden = !message.thought;
			say(thought.lastChild, message.thought ?? "");
			say(stats, message.failed ?? message.stats ?? "");
			mark(stats, "class", message.failed ? "stats bad" : "stats");
			mark(node, "aria-busy", message.busy ? "true" : null);
		};
		message.draw();
		return node;
	}

	// --- images -------------------------------------------------------------------------

	function drawPictures() {
		fill(pictures, draft.images.map((address, place) => el("li", {}, el("img", { src: address, alt: `Image ${place + 1}` }),
			simpleButton("×", () => {
				draft.images.splice(place, 1);
				drawPictures();
			}, { class: "plain", "aria-label": `Take image ${place + 1} off` }))));
		pictures.hidden = !draft.images.length;
	}

	async function addImages(files) {
		for (const one of files) {
			if (!one.type.startsWith("image/")) continue;
			if (one.size > MOST_IMAGE_BYTES) {
				say(told, `${inline(one.name)} is larger than 12 MiB`);
				continue;
			}
			draft.images.push(await dataUrl(one));
		}
		drawPictures();
	}

	file.addEventListener("change", () => {
		addImages([...file.files]);
		file.value = "";
	});
	text.addEventListener("paste", (event) => {
		if (event.clipboardData.files.length) addImages([...event.clipboardData.files]);
	});
	form.addEventListener("dragover", (event) => event.preventDefault());
	form.addEventListener("drop", (event) => {
		event.preventDefault();
		addImages([...event.dataTransfer.files]);
	});

	// --- asking -------------------------------------------------------------------------

	text.addEventListener("input", () => (draft.text = text.value));
	text.addEventListener("keydown", (event) => {
		if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
			event.preventDefault();
			form.requestSubmit();
		}
	});
	clear.addEventListener("click", () => {
		running?.abort();
		if (conversation.length) forgotten = conversation;
		conversation = [];
		drawAll();
		text.focus();
	});
	form.addEventListener("submit", async (event) => {
		event.preventDefault();
		if (running || (!draft.text.trim() && !draft.images.length)) return;
		say(told, "");
		forgotten = null;
		if (!conversation.length) fill(talk);
		const question = { role: "user", content: draft.text, images: draft.images };
		const answer = { role: "assistant", content: "", model: model.value, busy: true, stats: "…" };
		conversation.push(question, answer);
		talk.append(drawMessage(question), drawMessage(answer));
		draft = { text: "", images: [] };
		text.value = "";
		drawPictures();
		running = new AbortController();
		send.hidden = true;
		stop.hidden = false;
		try {
			await answered(answer);
		} finally {
			answer.busy = false;
			answer.draw();
			running = null;
			send.hidden = false;
			stop.hidden = true;
			announce(answer.failed ?? "the answer is complete");
		}
	});

	async function answered(answer) {
		const body = { model: model.value || undefined, stream: true, stream_options: { include_usage: true }, messages: [] };
		if (system.value.trim()) body.messages.push({ role: "system", content: system.value });
		for (const one of conversation) {
			if (one !== answer && (one.content || one.images?.length)) body.messages.push({ role: one.role, content: contentOf(one) });
		}
		for (const [name, input] of inputs) if (input.value !== "") body[name] = Number(input.value);
		const began = performance.now();
		let first = null;
		let count = 0;
		let usage = null;
		const measure = (isOver) => {
			const now = performance.now();
			const tokens = usage?.completion_tokens ?? count;
			const writing = (now - (first ?? now)) / 1000;
			const isLoading = live.state?.models?.some(({ id, state }) => id === answer.model && state === "loading");
			const parts = [first === null ? `${isLoading ? "loading the model" : "waiting"} for ${span((now - began) / 1000)}` : `first token after ${span((first - began) / 1000)}`];
			if (writing > 0 && tokens > 1) parts.push(`${rate((tokens - 1) / writing)} tokens/s`);
			if (tokens) parts.push(usage ? `${whole(usage.prompt_tokens)} in, ${whole(tokens)} out` : plural(tokens, "piece"));
			if (isOver) parts.push(span((now - began) / 1000));
			answer.stats = parts.join(" · ");
		};
		const clock = setInterval(() => {
			measure(false);
			answer.draw();
		}, 250);
		try {
			const response = await ask(root("v1/chat/completions"), { method: "POST", body, signal: running.signal });
			for await (const { data } of eventsOf(response)) {
				if (data === "[DONE]") break;
				const piece = JSON.parse(data);
				if (piece.error) throw new Error(piece.error.message);
				const delta = piece.choices?.[0]?.delta;
				const thought = delta?.reasoning_content ?? delta?.reasoning;
				if (delta?.content || thought) {
					first ??= performance.now();
					count += 1;
					answer.content += delta.content ?? "";
					if (thought) answer.thought = (answer.thought ?? "") + thought;
					follow(() => answer.draw());
				}
				usage = piece.usage ?? usage;
			}
			measure(true);
		} catch (error) {
			measure(true);
			if (running.signal.aborted) answer.stats += " · stopped";
			else answer.failed = inline(error.message);
		} finally {
			clearInterval(clock);
		}
	}

	/** Draw, and stay at the end if that is where one looks. */
	function follow(drawing) {
		const isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
		drawing();
		if (isAtEnd) talk.scrollTop = talk.scrollHeight;
	}
}

function contentOf({ content, images }) {
	if (!images?.length) return content;
	const pictures = images.map((url) => ({ type: "image_url", image_url: { url } }));
	return content ? [{ type: "text", text: content }, ...pictures] : pictures;
}

function dataUrl(file) {
	return new Promise((done, failed) => {
		const reader = new FileReader();
		reader.addEventListener("load", () => done(reader.result));
		reader.addEventListener("error", () => failed(reader.error));
		reader.readAsDataURL(file);
	});
}

/** Which model; the one of the address stays chosen even if it is not listed now. */
function modelField(params) {
	const select = el("select", { id: "model" }, params.model ? el("option", { value: params.model }, inline(params.model)) : null);
	select.addEventListener("change", () => keep({ model: select.value }));
	const node = el("div", { class: "field" }, el("label", { for: "model" }, "Model"), select);
	return {
		node,
		get value() {
			return select.value;
		},
		async load(signal) {
			const { data } = await (await ask(root("v1/models"), { signal })).json();
			const names = data.map(({ id }) => id);
			if (params.model && !names.includes(params.model)) names.unshift(params.model);
			fill(select, names.map((name) => el("option", { value: name, selected: name === params.model }, inline(name))));
			if (!names.length) fill(select, el("option", { value: "" }, "no model can be used with this key"));
		},
	};
}
