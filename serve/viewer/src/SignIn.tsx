/** Signing in: a token is exchanged for a cookie that scripts cannot read. */

import { useState } from "preact/hooks";
import { api, Problem } from "./api.ts";
import { loadSession, notice } from "./state.ts";
import { ThemeTool } from "./ui.tsx";

export function SignIn() {
  const [busy, setBusy] = useState(false);
  const [fault, setFault] = useState("");

  async function submit(event: SubmitEvent): Promise<void> {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    const token = String(new FormData(form).get("token") ?? "").trim();
    if (!token) return setFault("Paste the token that you were given.");
    if (!/^[\x21-\x7e]+$/.test(token)) return setFault("This is no token: tokens have letters, digits and signs, no spaces.");
    setBusy(true);
    setFault("");
    try {
      await api.post("/v1/session", {}, { headers: { Authorization: `Bearer ${token}` }, quiet: true });
      notice.value = null;
      await loadSession();
    } catch (error) {
      setFault(error instanceof Problem && error.status === 401 ? "The service does not know this token." : String((error as Error).message));
    } finally {
      setBusy(false);
    }
  }

  return (
    <main class="sign-in">
      <form onSubmit={(event) => void submit(event)}>
        <h1>pathflip</h1>
        <p>Sign in to look at the slides of this archive.</p>
        <label for="token">Access token</label>
        <input
          id="token"
          name="token"
          type="password"
          autocomplete="off"
          spellcheck={false}
          aria-describedby="token-help token-fault"
          aria-invalid={fault ? true : undefined}
          autofocus
        />
        <p id="token-help" class="hint">
          Whoever runs this service gives it to you. This page does not keep it; you stay signed in for twelve hours.
        </p>
        <p id="token-fault" class="fault" role="alert">
          {fault}
        </p>
        <button type="submit" class="primary" disabled={busy}>
          {busy ? "Signing in…" : "Sign in"}
        </button>
      </form>
      <ThemeTool />
    </main>
  );
}
