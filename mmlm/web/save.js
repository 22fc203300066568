(text) => {
  const file = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = file;
  link.download = "mmlm-settings.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(file), 1000);
}
