"""Commands of the service: view, serve, mcp, audit."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from pathflip.cli.options import (
    ArchiveOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    OverrideOption,
    print_json,
    service,
    show_table,
    were_set,
)
from pathflip.cli.process import import_arrow, open_archive

app = typer.Typer()
audit_app = typer.Typer(help="The audit log of the service.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")


@app.command()
def serve(
    archive: ArchiveOption,
    run: Annotated[str, typer.Option("--run", help="Run whose model searches, grounds, answers.")],
    llm: Annotated[
        str | None, typer.Option(help="Tuned run that answers; default: --run, if it is tuned.")
    ] = None,
    patches: Annotated[
        str | None,
        typer.Option(
            help="Run of a patch model whose features the archive has: patches by words.",
            metavar="RUN",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(
            help="Clients and their tokens; required to listen beyond this machine.", metavar="FILE"
        ),
    ] = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve search, grounding, classification and chat (OpenAI's API) over HTTP until stopped."""
    from pathflip.config import load_config

    settings_module, local = service("config", extra="serve"), service("local", extra="serve")
    settings = load_config(
        settings_module.ServeConfig,
        given=were_set(archive=archive, run=run, llm=llm, token_file=token_file, patches=patches),
        file=config,
        overrides=overrides or (),
    )
    out = sys.stdout

    def ready(document: dict[str, Any]) -> None:
        # The only line on stdout; what Ray prints goes elsewhere.
        with redirect_stdout(out):
            if as_json:
                print_json(document)
            else:
                patches = document["patches"]
                also = f", patches by {patches}" if patches else ""
                url = document["url"]
                print(f"pathflip serves {document['archive']} at {url}{also}; the viewer: {url}/")
            out.flush()

    with redirect_stdout(sys.stderr):
        local.run(settings, host=host, port=port, ready=ready)


@app.command()
def mcp(
    archive: ArchiveOption,
    run: Annotated[
        str | None, typer.Option("--run", help="Run whose model searches, grounds, answers.")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="Tuned run that answers; default: --run, if it is tuned.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or auto for a GPU if there is one; default: auto."),
    ] = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
) -> None:
    """Give a language model's agent eyes: tools over stdio, by the Model Context Protocol.

    Without --run an agent lists slides, looks and measures. Stdout is the protocol's.
    """
    from pathflip.config import load_config

    import_arrow()
    agents, local = service("mcp", extra="mcp"), service("local_parts", extra="mcp")
    with redirect_stdout(sys.stderr):
        settings = load_config(
            local.AgentConfig,
            given=were_set(archive=archive, run=run, llm=llm, device=device),
            file=config,
            overrides=overrides or (),
        )
        parts = local.local_parts(settings)
    agents.run_stdio(parts, limits=settings.limits)


@app.command()
def view(
    slide: Annotated[
        str | None,
        typer.Argument(
            help="Slide of the archive, by id or file name; without --archive a file or a folder.",
        ),
    ] = None,
    archive: Annotated[
        str | None, typer.Option("--archive", help="Archive: a folder, or s3://, gs://, az://.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Run whose model searches and grounds.")
    ] = None,
    device: DeviceOption = "cpu",
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on, 0 for any; default: 8000 if it is free.", min=0, max=65535
        ),
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open a browser where there is one.")
    ] = True,
    embed: Annotated[bool, typer.Option("--embed", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at slides in a browser: an archive's, a file, or a folder of them, until Ctrl-C."""
    out = sys.stdout

    def ready(document: dict[str, Any]) -> None:
        with redirect_stdout(out):
            if as_json:
                print_json(document)
            else:
                print(f"Look at {document['url']} (Ctrl-C ends it)")
            out.flush()
        if browser and not embed:
            _open_browser(document["url"])

    with redirect_stdout(sys.stderr):
        if archive is not None:
            open_archive(archive)  # imports what opens archives, and nothing that it can do without
        service("view", extra="viewer").view(
            slide, archive=archive, run=run, device=device, port=port, embed=embed, ready=ready
        )


def _open_browser(url: str) -> None:
    """Open a browser with a window; one in the terminal would take its place."""
    import os
    import webbrowser

    windows = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if windows:
        webbrowser.open(url)


@audit_app.command("verify")
def audit_verify(
    path: Annotated[str, typer.Argument(help="Folder of the log, or one of its files.")],
    kept: Annotated[
        list[str] | None,
        typer.Option(
            "--head", metavar="HASH", help="Head that was kept elsewhere; may be given again."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no line was changed, removed, inserted or cut off; print the heads."""
    heads = service("audit", extra="viewer").verify(path, kept=kept or ())
    rows = [
        {"file": name, "lines": head.lines, "torn": head.torn, "head": head.hash}
        for name, head in heads.items()
    ]
    if as_json:
        print_json({"ok": True, "files": rows})
    else:
        show_table(
            "the audit log is whole", ("file", "lines", "torn", "head"),
            [list(row.values()) for row in rows],
        )  # fmt: skip
