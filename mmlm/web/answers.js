// A word of an answer is a button: a click, Enter or Space asks where the model looked.
const ask = (word) => {
  const turn = word.closest(".turn"), column = word.closest(".column");
  if (!["done", "stopped"].includes(column.dataset.state)) return;
  trigger("click", {
    turn: turn.dataset.turn, column: column.dataset.column,
    start: word.dataset.start, end: word.dataset.end,
  });
};
element.addEventListener("click", (event) => {
  const word = event.target.closest(".word");
  if (word) ask(word);
});
element.addEventListener("keydown", (event) => {
  const word = event.target.closest(".word");
  if (word && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    ask(word);
  }
});
