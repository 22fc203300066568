(settings) => {
  // Other parts of the address (Gradio's theme) stay.
  const address = new URL(window.location.href);
  address.searchParams.set("settings", settings);
  window.history.replaceState(null, "", address);
  // Only secure pages (https, localhost) have a clipboard; the address bar has the link anyway.
  if (navigator.clipboard) navigator.clipboard.writeText(address.href).catch(() => {});
  const button = document.querySelector("#link"), before = button.textContent;
  button.textContent = navigator.clipboard ? "Copied" : "In the address bar";
  setTimeout(() => { button.textContent = before; }, 1500);
}
