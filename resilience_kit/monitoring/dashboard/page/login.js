// Sends the token in a request's body: a URL would end in logs.
const form = document.querySelector("form");
const problem = document.querySelector("[role=alert]");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  try {
    const response = await fetch("login", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ token: document.querySelector("#token").value }),
    });
    if (response.ok) {
      location.reload();
      return;
    }
    problem.textContent = response.status === 401 ? "This is not the token." : `The server says ${response.status}.`;
  } catch {
    problem.textContent = "The server does not answer.";
  }
});
