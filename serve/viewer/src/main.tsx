/** The page: who is here, then the slide, the comparison or the archive that the address names. */

import { render } from "preact";
import { useEffect } from "preact/hooks";
import { ArchivePage } from "./ArchivePage.tsx";
import { ComparePage } from "./ComparePage.tsx";
import { listen, route } from "./route.ts";
import { SignIn } from "./SignIn.tsx";
import { SlidePage } from "./SlidePage.tsx";
import { loadSession, report, session } from "./state.ts";
import { Notices, startTheme } from "./ui.tsx";
import "./style.css";

function Page() {
  const at = route.value;
  const title = at.page === "slide" ? at.id : at.page === "compare" ? `${at.left} and ${at.right}` : "Archive";
  useEffect(() => {
    document.title = `${session.value ? title : "Sign in"} · pathflip`;
  });
  if (session.value === undefined) return <p class="loading">Loading…</p>;
  if (session.value === null) return <SignIn />;
  if (at.page === "slide") return <SlidePage key={at.id} at={at} />;
  if (at.page === "compare") return <ComparePage key={`${at.left}\n${at.right}`} at={at} />;
  return <ArchivePage at={at} />;
}

// What fails without anybody waiting for it is said too, rather than a page that stands still.
addEventListener("error", (event) => event.error && report(event.error));
addEventListener("unhandledrejection", (event) => report(event.reason));

startTheme();
listen();
void loadSession();
render(
  <>
    <Page />
    <Notices />
  </>,
  document.getElementById("app")!,
);
