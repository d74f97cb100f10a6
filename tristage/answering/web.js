"use strict";
const find = (id) => document.getElementById(id);
const turns = find("turns"), text = find("text"), send = find("send"), stop = find("stop"), blind = find("blind");
let stopper = null;

function element(tag, content, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (content !== undefined) made.textContent = content;
  return made;
}

function tell(problem) {
  find("error").textContent = problem;
}

async function post(path, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error((await answer.json()).error || `the server answered ${answer.status}`);
  return answer;
}

function tokens(values) {
  const numbers = values.map((pair) => pair[1]);
  const low = Math.min(...numbers), high = Math.max(...numbers);
  const line = element("p");
  for (const [token, value] of values) {
    const share = high > low ? (value - low) / (high - low) : 0.5;
    const shown = element("span", token, { className: "token", title: value.toFixed(3) });
    shown.style.background = `rgb(${70 + 110 * (1 - share)}, ${60 + 60 * share}, 70)`;
    line.append(shown);
  }
  return line;
}

function draw(turn, answers) {
  const sides = element("div", undefined, { className: "sides" });
  for (const answer of answers) {
    const side = element("div", undefined, { className: "side" });
    const facts = [answer.name];
    if (answer.score !== undefined) facts.push(`score ${answer.score.toFixed(3)}`);
    if (!answer.ended && answer.done) facts.push("cut at the limit");
    side.append(element("h3", facts.join(", ")));
    const coloured = answer.tokens && find("values").checked;
    side.append(coloured ? tokens(answer.tokens) : element("p", answer.text || "..."));
    sides.append(side);
  }
  turn.querySelector(".sides").replaceWith(sides);
}

function askForVote(turn) {
  const votes = element("div", undefined, { className: "votes" });
  votes.setAttribute("role", "group");
  votes.setAttribute("aria-label", "Which answer is better?");
  for (const [choice, label] of [["a", "A is better"], ["tie", "Tie"], ["b", "B is better"]]) {
    const button = element("button", label, { type: "button" });
    button.addEventListener("click", async () => {
      try {
        const kept = await (await post("/vote", { choice })).json();
        const names = kept.names.map((name, place) => {
          const score = kept.scores ? ` (score ${kept.scores[place].toFixed(3)})` : "";
          return `${"AB"[place]} was ${name}${score}`;
        });
        votes.replaceWith(element("p", `You chose ${label}: ${names.join(", ")}`, { className: "muted" }));
        showTally(kept.tally);
        send.disabled = false;
        text.focus();
      } catch (error) {
        tell(error.message);
      }
    });
    votes.append(button);
  }
  turn.append(votes);
  send.disabled = true;
  votes.querySelector("button").focus();
}

function showTally(rows) {
  const body = document.querySelector("#tally tbody");
  if (!body) return;
  find("votes").hidden = rows.length === 0;
  body.replaceChildren(...rows.map((row) => {
    const line = element("tr");
    line.append(element("th", row.model, { scope: "row" }));
    for (const name of ["wins", "losses", "ties"]) line.append(element("td", String(row[name])));
    const percent = (share) => `${(100 * share).toFixed(0)} %`;
    const share = row.share === null ? "-" : `${percent(row.share)} (${percent(row.low)} to ${percent(row.high)})`;
    line.append(element("td", share));
    return line;
  }));
}

async function ask(question) {
  const turn = element("article", undefined, { className: "turn" });
  turn.append(element("p", question), element("div", undefined, { className: "sides" }));
  turns.append(turn);
  stopper = new AbortController();
  let last = null;
  try {
    const answer = await post("/ask", { text: question }, stopper.signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        if (last.error) throw new Error(last.error);
        draw(turn, last.answers);
      }
    }
    if (last) draw(turn, last.answers.map((answer) => ({ ...answer, done: true })));
    if (last && last.vote) askForVote(turn);
    return true;
  } catch (error) {
    if (error.name === "AbortError") return true;
    tell(error.message);
    turn.remove();
    return false;
  } finally {
    turn.answers = last ? last.answers : [];
    stopper = null;
  }
}

find("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || send.disabled) return;
  tell("");
  send.disabled = true;
  stop.disabled = false;
  const answered = await ask(question);
  stop.disabled = true;
  if (answered) text.value = "";
  if (!document.querySelector(".votes")) {
    send.disabled = false;
    text.focus();
  }
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    find("form").requestSubmit();
  }
});
stop.addEventListener("click", () => stopper && stopper.abort());

async function restart() {
  try {
    await post("/new", { blind: Boolean(blind && blind.checked) });
    turns.replaceChildren();
    tell("");
    send.disabled = false;
    text.focus();
  } catch (error) {
    tell(error.message);
  }
}
find("new").addEventListener("click", restart);
if (blind) blind.addEventListener("change", restart);
if (find("values")) {
  find("values").addEventListener("change", () => {
    for (const turn of document.querySelectorAll(".turn")) if (turn.answers) draw(turn, turn.answers);
  });
}
showTally(JSON.parse(find("start").textContent).tally);
restart(); // the server may have another page's conversation
