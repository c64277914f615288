"""The Model Context Protocol: the tools of agents at ``/mcp`` of the service, or over stdio.

At ``/mcp`` a request holds one message and gets one JSON answer, without a session: any replica
answers it. It passes :class:`serve.middleware.Guard` as all requests do, so tokens, limits,
deadlines and the audit log are the same; a tool is listed to clients that have its scope. The
package ``mcp`` is imported when the first agent comes.

Read in this order: :func:`make_server`, :class:`Endpoint`, :func:`run_stdio`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.routing import Route

from pathflip import __version__
from pathflip.errors import ConfigError, PathFLIPError
from serve import mcp_model_tools, mcp_tools
from serve.auth import LOCAL, Client
from serve.limits import Limits, RequestError, strict_json
from serve.mcp_tools import Answered, Call, Tool
from serve.metrics import Metrics
from serve.middleware import Message, Receive, Scope, Send, on_one_line, status_of
from serve.sign_in import check_site

if TYPE_CHECKING:
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp_types import (
        CallToolRequestParams,
        CallToolResult,
        ListToolsResult,
        PaginatedRequestParams,
    )
    from mcp_types import Tool as ToolInfo

    from serve.routing import Parts

logger = logging.getLogger(__name__)

PATH = "/mcp"
MAX_BODY = 1 << 20
"""Bytes of a message: tools take words and numbers, no picture."""
TOOLS = (*mcp_tools.TOOLS, *mcp_model_tools.TOOLS)

INSTRUCTIONS = """\
pathflip shows the whole-slide images of an archive: microscope pictures of tissue, up to 100,000 \
pixels a side. Slides are named by id. Places are level-0 pixels, those of the slide's finest \
level: (0, 0) is its upper left corner, x grows to the right, y downwards. Every slide says its \
mpp, µm per level-0 pixel, so µm = pixels * mpp. Sizes of squares are in µm. Every picture comes \
with x0, y0 and px0: its pixel (u, v) is at level-0 x = x0 + u * px0, y = y0 + v * px0.
Begin with list_slides, or with search where there is one. Look at the whole slide with \
describe_slide, then at ever smaller squares with view: 5,000 µm a side show the architecture, \
1,000 µm glands and vessels, 250 µm single cells. Where ground is listed, it says where to look."""
"""Instructions that a model is given with the tools."""


_INSTALL = "Install it: pip install 'pathflip[mcp]'."


def available(parts: Parts) -> dict[str, Tool]:
    """{name: tool} of those whose parts are all there."""
    there = (t for t in TOOLS if all(getattr(parts, part) is not None for part in t.parts))
    return {tool.name: tool for tool in there}


def make_server(parts: Parts, *, limits: Limits, metrics: Metrics | None = None) -> Server[Any]:
    """Make the server of the protocol over the parts, for any transport.

    Args:
        parts: The parts that answer.
        limits: Limits of an answer.
        metrics: Counts tokens of answers; None counts none.
    """
    from mcp.server.lowlevel import Server
    from mcp.shared.exceptions import MCPError
    from mcp_types import INVALID_PARAMS, ListToolsResult

    tools = available(parts)
    told = {name: _told(tool) for name, tool in tools.items()}

    async def list_tools(
        context: ServerRequestContext[Any], _: PaginatedRequestParams | None
    ) -> ListToolsResult:
        scopes = _client(context)[0].scopes
        return ListToolsResult(tools=[told[name] for name in tools if tools[name].scope in scopes])

    async def call_tool(
        context: ServerRequestContext[Any], params: CallToolRequestParams
    ) -> CallToolResult:
        client, state = _client(context)
        tool = tools.get(params.name)
        if tool is None:
            raise MCPError(INVALID_PARAMS, "There is no tool of this name; tools/list names them.")
        audit = state["audit"]
        audit["tool"] = tool.name
        call = Call(
            parts=parts, limits=limits, client=client.name, scopes=client.scopes, audit=audit,
            metrics=metrics,
        )  # fmt: skip
        try:
            if tool.scope not in client.scopes:
                raise RequestError(f"This token lacks the scope {tool.scope}.", code="scope")
            asked = tool.arguments.model_validate(params.arguments or {})
            return _result(await tool.run(asked, call))
        except Exception as error:  # the outermost line of a request
            code, text = _fault(error, parts, state.get("request_id", "stdio"))
            audit["error"] = code
            return _failed(code, text)

    return Server(
        "pathflip",
        version=__version__,
        title="pathflip",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _client(context: ServerRequestContext[Any]) -> tuple[Client, dict[str, Any]]:
    """The client, and what :class:`serve.middleware.Guard` knows of its request.

    Over stdio there is no request: whoever started the process may do what it can.
    """
    if context.request is None:
        return LOCAL, {"audit": {}}
    state: dict[str, Any] = context.request.scope["state"]
    return state["client"], state


def _told(tool: Tool) -> ToolInfo:
    """Describe a tool to clients."""
    from mcp_types import Tool as ToolInfo
    from mcp_types import ToolAnnotations

    return ToolInfo(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=_schema(tool.arguments),
        output_schema=_schema(tool.result),
        annotations=ToolAnnotations(
            read_only_hint=True, idempotent_hint=True, open_world_hint=False
        ),
    )


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a model without the titles that pydantic makes of names."""
    made: dict[str, Any] = _untitled(model.model_json_schema())
    return made


def _untitled(node: Any) -> Any:
    if isinstance(node, list):
        return [_untitled(one) for one in node]
    if not isinstance(node, dict):
        return node
    # A title is a text; a property of that name would be a schema.
    return {
        key: _untitled(value)
        for key, value in node.items()
        if key != "title" or not isinstance(value, str)
    }


def _result(answered: Answered) -> CallToolResult:
    """Document as structured result and, for clients that read none, as text; then pictures."""
    from mcp_types import CallToolResult, ImageContent, TextContent

    document = answered.document.model_dump(mode="json", exclude_unset=True)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    content: list[Any] = [TextContent(type="text", text=text)]
    for picture in answered.pictures:
        data = base64.b64encode(picture.data).decode()
        content.append(TextContent(type="text", text=picture.caption))
        content.append(ImageContent(type="image", data=data, mime_type="image/jpeg"))
    return CallToolResult(content=content, structured_content=document)


def _failed(code: str, text: str) -> CallToolResult:
    from mcp_types import CallToolResult, TextContent

    return CallToolResult(
        content=[TextContent(type="text", text=f"{code}: {text}")],
        is_error=True,
        _meta={"code": code},
    )


def _fault(error: Exception, parts: Parts, request_id: str) -> tuple[str, str]:
    """Code and text of an error: cause and hint, no path, and nothing that was sent."""
    if isinstance(error, ValidationError):
        faults = (
            f"{'.'.join(map(str, fault['loc']))[:200] or 'arguments'}: {str(fault['msg'])[:300]}"
            for fault in error.errors(include_url=False, include_input=False)[:20]
        )
        return "invalid", f"The arguments do not fit. {'; '.join(faults)}"
    if isinstance(error, PathFLIPError) and status_of(error) != 500:
        return error.code, parts.public(f"{error.message} {error.hint}".strip())
    logger.error("request %s: %s", request_id, on_one_line(error))
    return "internal", "Internal error of the service. The operator's log says more."


# -- HTTP -----------------------------------------------------------------------------------------


class Endpoint:
    """ASGI application behind the path of the protocol.

    Args:
        parts: The parts that answer.
        limits: Limits of an answer.
        metrics: Counts tokens of answers.
    """

    path = PATH
    """Template by which requests are counted and audited."""

    def __init__(self, parts: Parts, *, limits: Limits, metrics: Metrics) -> None:
        self._parts, self._limits, self._metrics = parts, limits, metrics
        self._server: Server[Any] | None = None

    def route(self) -> Route:
        """Route to it: there is no stream to GET and no session to DELETE."""
        return Route(self.path, endpoint=self, methods=["POST"], include_in_schema=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one message.

        Raises:
            RequestError: ``cross_site``, ``too_large``, ``bad_json``; ``no_mcp``: there is no
                package ``mcp``.
        """
        scope["route"] = self
        request = Request(scope, receive)
        if {"origin", "sec-fetch-site"} & set(request.headers):  # a browser's
            check_site("POST", request.headers)
        body = await request.body()
        if len(body) > MAX_BODY:
            raise RequestError(f"A message has at most {MAX_BODY:,} bytes.", code="too_large")
        strict_json(body)  # the package takes what two parsers may read differently
        server = await self._made()
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        # One for each request, so that its tasks end with it, and before the answer leaves: an
        # audit log that cannot be written is an error of the request, not of a task.
        manager = StreamableHTTPSessionManager(
            server, json_response=True, stateless=True, max_request_body_size=MAX_BODY
        )
        answer: list[Message] = []
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        async def keep(message: Message) -> None:
            answer.append(message)

        async with manager.run():
            await manager.handle_request(scope, replay, keep)
        for message in answer:
            await send(message)

    async def _made(self) -> Server[Any]:
        if self._server is None:
            try:
                self._server = await asyncio.to_thread(
                    make_server, self._parts, limits=self._limits, metrics=self._metrics
                )
            except ModuleNotFoundError as error:
                raise RequestError(
                    "This service lacks the package mcp.", hint=_INSTALL, code="no_mcp"
                ) from error
            # A line for each request would hold addresses and ids.
            logging.getLogger("mcp").setLevel(logging.ERROR)
        return self._server


# -- stdio ----------------------------------------------------------------------------------------


def run_stdio(parts: Parts, *, limits: Limits) -> None:
    """Serve one agent over standard input and output until it closes them.

    Meanwhile file descriptor 1 is standard error for everything else, whatever prints.

    Raises:
        ConfigError: The package is not installed (``no_mcp``).
    """
    try:
        server = make_server(parts, limits=limits)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "This command needs the package mcp, which is not installed here.",
            hint=_INSTALL, code="no_mcp",
        ) from error  # fmt: skip
    asyncio.run(_serve_stdio(server))


async def _serve_stdio(server: Server[Any]) -> None:
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())
