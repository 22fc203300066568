() => {
  // Gradio follows the system until the visitor chooses; the choice holds for this page.
  document.body.classList.toggle("dark");
}
