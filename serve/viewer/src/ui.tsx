/** Small parts that every page uses: icons, buttons, dialogs, notices, the theme. */

import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";
import { api, slidePath } from "./api.ts";
import { notice, report, session, tell } from "./state.ts";
import { format } from "./route.ts";

const PATHS = {
  area: "M5 8l7-4 7 5-2 10-9 1z",
  back: "M14 5l-7 7 7 7M7 12h13",
  close: "M6 6l12 12M18 6L6 18",
  compare: "M4 5h7v14H4zM13 5h7v14h-7z",
  dark: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5z",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5M9 9h6v6H9z",
  full: "M9 4H4v5M15 4h5v5M9 20H4v-5M15 20h5v-5",
  grid: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  help: "M9 9a3 3 0 1 1 4.2 2.7c-.8.4-1.2 1-1.2 1.8v.5M12 17.5v.3",
  length: "M3 17L17 3l4 4L7 21zM8 12l2 2M11 9l2 2M14 6l2 2",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  link: "M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1",
  list: "M4 6h16M4 12h16M4 18h16",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  minus: "M5 12h14",
  open: "M7 12l5 5 5-5M12 4v13M5 20h14",
  panel: "M4 5h16v14H4zM14 5v14",
  plus: "M12 5v14M5 12h14",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  rotate: "M19 12a7 7 0 1 1-2.5-5.4M17 3v4h-4",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5L20 20",
  signOut: "M14 5H5v14h9M10 12h11M17 8l4 4-4 4",
  swap: "M4 8h14l-3-3M20 16H6l3 3",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}

interface ToolProps {
  icon: IconName;
  label: string;
  /** Key that does the same, for the tooltip. */
  hotkey?: string;
  pressed?: boolean;
  disabled?: boolean;
  onPress: () => void;
}

/** A button with a picture; its label is its name and its tooltip. */
export function Tool({ icon, label, hotkey, pressed, disabled, onPress }: ToolProps) {
  return (
    <button
      type="button"
      class="tool"
      aria-label={label}
      title={hotkey ? `${label} (${hotkey})` : label}
      aria-keyshortcuts={hotkey === "+" ? "Plus" : hotkey}
      aria-pressed={pressed}
      disabled={disabled}
      onClick={onPress}
    >
      <Icon name={icon} />
    </button>
  );
}

/** A window over the page; Escape closes it, and the keyboard returns to where it was. */
export function Dialog({ title, onClose, children }: { title: string; onClose: () => void; children: ComponentChildren }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => {
    const before = document.activeElement;
    dialog.current?.showModal();
    return () => {
      if (before instanceof HTMLElement) before.focus();
    };
  }, []);
  return (
    <dialog
      ref={dialog}
      class="dialog"
      aria-labelledby={id}
      onClose={onClose}
      onClick={(event) => {
        if (event.target === dialog.current) dialog.current?.close();
      }}
    >
      <div class="dialog-head">
        <h2 id={id}>{title}</h2>
        <Tool icon="close" label="Close" onPress={() => dialog.current?.close()} />
      </div>
      <div class="dialog-body">{children}</div>
    </dialog>
  );
}

/** The sentence that {@link notice} holds; errors stay until they are closed. */
export function Notices() {
  const now = notice.value;
  useEffect(() => {
    if (now?.kind !== "info") return;
    const timer = setTimeout(() => (notice.value = null), 6000);
    return () => clearTimeout(timer);
  }, [now]);
  return (
    <div class="notices">
      <div role="status" aria-live="polite">
        {now?.kind === "info" && <p class="notice">{now.text}</p>}
      </div>
      <div role="alert">
        {now?.kind === "error" && (
          <p class="notice error">
            {now.text}
            <Tool icon="close" label="Close this message" onPress={() => (notice.value = null)} />
          </p>
        )}
      </div>
    </div>
  );
}

// -- the theme ----------------------------------------------------------------------------------------

type Theme = "light" | "dark";

export function stored(name: string): string | null {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // the browser keeps nothing for pages
  }
}

export function store(name: string, value: string): void {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Then it lasts until the page is closed.
  }
}

const system = typeof matchMedia === "undefined" ? null : matchMedia("(prefers-color-scheme: dark)");
const theme = signal<Theme>("light");

function show(chosen: Theme): void {
  theme.value = chosen;
  document.documentElement.dataset.theme = chosen;
}

/** Take the theme chosen before, else the system's. */
export function startTheme(): void {
  const follow = () => {
    const before = stored("pathflip.theme");
    show(before === "dark" || before === "light" ? before : system?.matches ? "dark" : "light");
  };
  follow();
  system?.addEventListener("change", follow);
}

export function ThemeTool() {
  const other: Theme = theme.value === "dark" ? "light" : "dark";
  return (
    <Tool
      icon={other}
      label={other === "dark" ? "Dark colours" : "Light colours"}
      onPress={() => {
        store("pathflip.theme", other);
        show(other);
      }}
    />
  );
}

/** Whether single keys do something; readers who speak to their machine turn them off. */
export const hotkeys = signal(stored("pathflip.keys") !== "off");

export function fullScreen(): void {
  if (document.fullscreenElement) void document.exitFullscreen();
  else document.documentElement.requestFullscreen?.().catch(() => tell("This browser allows no full screen here."));
}

// -- who is here -----------------------------------------------------------------------------------------

async function signOut(): Promise<void> {
  try {
    await api.del("/v1/session");
    location.reload(); // what was asked and found is nobody else's
  } catch (error) {
    report(error);
  }
}

/** The theme, and signing out where there are tokens. */
export function Account() {
  return (
    <>
      <ThemeTool />
      {session.value?.tokens && (
        <Tool icon="signOut" label={`Sign out ${session.value.name}`} onPress={() => void signOut()} />
      )}
    </>
  );
}

/** The way to the archive, in the corner of every page. */
export function Home() {
  return (
    <a class="home" href={format({ page: "archive", q: "", label: "", status: "ready" })}>
      pathflip<span class="hidden"> archive</span>
    </a>
  );
}

/** Enough for a card on a screen of two pixels per CSS pixel. */
const THUMBNAIL_PX = 320;

/** A slide's picture; an empty frame where it has none. */
export function Thumbnail({ id, shown = true }: { id: string; shown?: boolean }) {
  return (
    <span class="thumb">
      {shown && (
        <img
          src={`${slidePath(id, "thumbnail")}?px=${THUMBNAIL_PX}`}
          alt=""
          loading="lazy"
          decoding="async"
          onError={(event) => event.currentTarget.remove()}
        />
      )}
    </span>
  );
}
