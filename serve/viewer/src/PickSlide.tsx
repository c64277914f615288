/** A window in which a slide of the archive is chosen by name. */

import { useEffect, useState } from "preact/hooks";
import { api } from "./api.ts";
import type { SlideList, SlideRow } from "./api.ts";
import { report } from "./state.ts";
import { Dialog, Thumbnail } from "./ui.tsx";

interface Props {
  title: string;
  /** Not offered. */
  except?: string;
  onPick: (slideId: string) => void;
  onClose: () => void;
}

export function PickSlide({ title, except, onPick, onClose }: Props) {
  const [words, setWords] = useState("");
  const [found, setFound] = useState<SlideRow[] | null>(null);
  useEffect(() => {
    const call = new AbortController();
    const timer = setTimeout(() => {
      const query = new URLSearchParams({ limit: "30", ...(words.trim() && { q: words.trim() }) });
      api.get<SlideList>(`/v1/slides?${query}`, { signal: call.signal }).then(({ data }) => setFound(data), report);
    }, 150);
    return () => {
      clearTimeout(timer);
      call.abort();
    };
  }, [words]);
  const offered = found?.filter((row) => row.slide_id !== except);
  return (
    <Dialog title={title} onClose={onClose}>
      <label class="field">
        Name of the slide
        <input type="search" autofocus value={words} spellcheck={false} onInput={(event) => setWords(event.currentTarget.value)} />
      </label>
      <p class="hint" role="status">
        {offered ? (offered.length ? "" : "No other slide has this in its name.") : "Loading…"}
      </p>
      <ul class="picks">
        {offered?.map((row) => (
          <li key={row.slide_id}>
            <button type="button" class="plain" onClick={() => onPick(row.slide_id)}>
              <Thumbnail id={row.slide_id} />
              <span>{row.slide_id}</span>
            </button>
          </li>
        ))}
      </ul>
    </Dialog>
  );
}
