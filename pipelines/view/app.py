"""Pages and data of the viewer, each a function of a request.

Only GET is answered, only for the host names of this machine (a page of another site could reach
the server by a name that resolves to 127.0.0.1), and a browser runs no script that is not one of
ours: :data:`POLICY`. The report has its scripts inside itself and is shut off from the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from braggflux.integrator.errors import UserError
from braggflux.pipelines.report.html import VIEWER
from braggflux.pipelines.report.terminal import peaks_table
from braggflux.pipelines.view.query import FLAGS, ORDERS, PAGE, Query, number
from braggflux.pipelines.view.run_data import RunData
from braggflux.pipelines.workspace.records.readers import read_table
from braggflux.pipelines.workspace.rundir import REFERENCE

HERE = Path(__file__).parent
HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
#: Of the report: its own scripts run, in an origin that is none.
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; worker-src blob:; base-uri 'none'; "
    "frame-ancestors 'none'; "
    "sandbox allow-scripts allow-downloads allow-popups allow-popups-to-escape-sandbox "
    "allow-top-navigation-by-user-activation"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
BAD_REQUEST, NOT_FOUND = 400, 404


def build_app(path: Path, dials: Path | None = None) -> Starlette:
    """Make the application for a run directory.

    Raises
    ------
    UserError
        As :class:`~braggflux.pipelines.view.run_data.RunData`.
    """
    pages = Pages(RunData(path, dials))
    frame = "/frames/{sweep:int}/{frame:int}/{panel:int}"
    routes = [
        Route("/", pages.overview),
        Route("/frames", pages.frames),
        Route(f"{frame}/counts", pages.counts),
        Route(f"{frame}/mask", pages.mask),
        Route(f"{frame}/boxes", pages.boxes),
        Route("/frames/{sweep:int}/{panel:int}/geometry", pages.geometry),
        Route("/reflections", pages.reflections),
        Route("/reflection/{row:int}", pages.reflection),
        Route("/reflection/{row:int}/data", pages.reflection_data),
        Route("/map/{site:int}", pages.map),
        Route("/map/{site:int}/data", pages.map_data),
        Route("/report", pages.report),
        Route("/model", pages.model),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    handlers: dict[Any, Callable[..., Response]] = {
        UserError: pages.mistake,
        HTTPException: pages.refusal,
    }
    middleware = [
        Middleware(_Guarded),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Guarded:
    """Sets :data:`HEADERS` and the policy on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                given = HEADERS | {"content-security-policy": POLICY}
                extra = [(k.encode(), v.encode()) for k, v in given.items()]
                message["headers"] += [(k, v) for k, v in extra if k not in names]
            await send(message)

        await self._app(scope, receive, guarded)


class Pages:
    """The pages of a run.

    Parameters
    ----------
    data : RunData
    """

    def __init__(self, data: RunData) -> None:
        self.data = data
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._environment.filters["digits"] = _digits

    def _page(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        title = self.data.run.path.absolute().name
        page = self._environment.get_template(name).render(run=title, **values)
        return HTMLResponse(page, status)

    def mistake(self, request: Request, error: Exception) -> Response:
        """Answer a mistake of the user in one line."""
        return self._refused(request, BAD_REQUEST, str(error))

    def refusal(self, request: Request, error: HTTPException) -> Response:
        """Answer for what there is not."""
        return self._refused(request, error.status_code, str(error.detail))

    def _refused(self, request: Request, status: int, text: str) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"error": text}, status)
        return self._page("error.html.j2", status, message=text)

    def overview(self, request: Request) -> Response:
        """Show what the run is, its sites and the ways on."""
        data, sets = self.data, []
        for own, maps in zip(data.data_sets, data.maps, strict=True):
            try:
                sites = [s.name for s in maps.sites]
                reason = ""
            except UserError as error:
                sites, reason = [], str(error)
            peaks = {
                (p["chain"], p["seqid"], p["residue"], p["atom"], p["epoch"]): p["peak_sigma"]
                for p in own.read_peaks()
            }
            last = max((k[-1] for k in peaks if k[-1] != REFERENCE), default=None)
            rows = [
                {
                    "name": f"{residue} {chain}{seqid} {atom}",
                    "ours": peaks.get((chain, seqid, residue, atom, last)),
                    "reference": peaks.get((chain, seqid, residue, atom, REFERENCE)),
                }
                for chain, seqid, residue, atom in sites
            ]
            statistics = [
                r for r in read_table(own.statistics_file, ("shell",)) if r["shell"] == "overall"
            ]
            shown = {"name": own.dataset, "sites": rows, "reason": reason}
            sets.append(shown | {"statistics": statistics, "notes": peaks_table(own)[2][:1]})
        return self._page(
            "overview.html.j2",
            sets=sets,
            sweeps=data.columns.sweeps,
            n=len(data.columns),
            session=data.run.read_provenance()["sessions"][-1],
            has_report=data.run.report.is_file(),
            n_flagged={
                word: int(np.count_nonzero(data.columns["flags"] & bit))
                for bit, word in FLAGS.items()
            },
            why_not=data.loading.why_not,
        )

    def frames(self, request: Request) -> Response:
        """Show the page of the frames."""
        given = request.query_params
        sweep = int(number(given.get("sweep", "0"), "sweep", whole=True))
        panel = int(number(given.get("panel", "0"), "panel", whole=True))
        self.data.frames.check(sweep, 0, panel)
        first = self.data.columns.sweeps[sweep].get("image_range", (1,))[0]
        image = int(number(given.get("image", str(first)), "image", whole=True))
        self.data.frames.check(sweep, image - first, panel)
        return self._page(
            "frames.html.j2",
            sweeps=self.data.columns.sweeps,
            sweep=sweep,
            panel=panel,
            image=image,
            mark=given.get("mark", "")[:12],
        )

    def _frame(self, request: Request) -> tuple[int, int, int]:
        place = request.path_params
        self.data.frames.check(place["sweep"], place.get("frame", 0), place["panel"])
        return place["sweep"], place.get("frame", 0), place["panel"]

    def counts(self, request: Request) -> Response:
        """Send the photons of a frame, uint16."""
        return _binary(self.data.frames.counts(*self._frame(request)))

    def mask(self, request: Request) -> Response:
        """Send the mask of a frame, uint8."""
        return _binary(self.data.frames.mask(*self._frame(request)))

    def boxes(self, request: Request) -> Response:
        """Send the boxes on a frame."""
        return JSONResponse(self.data.frames.boxes(*self._frame(request)))

    def geometry(self, request: Request) -> Response:
        """Send the resolution rings of a panel."""
        sweep, _, panel = self._frame(request)
        return JSONResponse(self.data.frames.geometry(sweep, panel))

    def reflections(self, request: Request) -> Response:
        """Show a page of the list of reflections."""
        query, mistake = Query.of(request.query_params), ""
        try:
            found, n_found, page = self.data.search.rows(query, self.data.z(needed=query.needs_z))
        except UserError as error:
            found, n_found, page, mistake = np.array([], int), 0, 1, str(error)
        return self._page(
            "reflections.html.j2",
            status=BAD_REQUEST if mistake else 200,
            query=query,
            rows=[self.data.list_entry(row) for row in found.tolist()],
            n_found=n_found,
            n=len(self.data.columns),
            page=page,
            n_pages=max(-(-n_found // PAGE), 1),
            mistake=mistake,
            orders=ORDERS,
            flags=FLAGS,
            n_sweeps=len(self.data.columns.sweeps),
            why_not=self.data.loading.why_not,
            address=lambda **changes: "?" + urlencode(_given(query) | changes),
        )

    def reflection(self, request: Request) -> Response:
        """Show the page of one reflection."""
        row = request.path_params["row"]
        self.data.check_row(row)
        entry = self.data.list_entry(row)
        return self._page("reflection.html.j2", entry=entry, n=len(self.data.columns))

    def reflection_data(self, request: Request) -> Response:
        """Send all about one reflection."""
        return JSONResponse(self.data.reflection(request.path_params["row"]))

    def _maps(self, request: Request) -> int:
        chosen = int(number(request.query_params.get("set", "0"), "set", whole=True))
        if not 0 <= chosen < len(self.data.maps):
            raise UserError(f"no data set {chosen}: there are {len(self.data.maps)}, from 0")
        return chosen

    def map(self, request: Request) -> Response:
        """Show the page of a site."""
        chosen, site = self._maps(request), request.path_params["site"]
        maps = self.data.maps[chosen]
        return self._page(
            "map.html.j2",
            site=site,
            label=maps.site(site).label,
            sites=[s.label for s in maps.sites],
            chosen=chosen,
            data_set=self.data.data_sets[chosen].dataset,
        )

    def map_data(self, request: Request) -> Response:
        """Send the map around a site."""
        maps = self.data.maps[self._maps(request)]
        return JSONResponse(maps.around(request.path_params["site"]))

    def report(self, request: Request) -> Response:
        """Show the report of the run."""
        path = self.data.run.report
        if not path.is_file():
            raise HTTPException(NOT_FOUND, "the run has no report: make it with braggflux report")
        # its links to reflections name the usual port
        text = path.read_text(encoding="utf-8").replace(VIEWER, f"{request.base_url}reflection/")
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    def model(self, request: Request) -> Response:
        """Say whether the model is there."""
        return JSONResponse({"reason": self.data.loading.why_not})


def _given(query: Query) -> dict[str, str]:
    """Parameters of a query that are not the default."""
    default = Query()
    return {k: v for k, v in vars(query).items() if v != getattr(default, k)}


def _binary(values: NDArray[Any]) -> Response:
    headers = {"x-shape": ",".join(map(str, values.shape))}
    return Response(values.tobytes(), media_type="application/octet-stream", headers=headers)


def _digits(value: float | str | None, n: int = 2) -> str:
    """Text of a number, a dash for none."""
    return "\N{EN DASH}" if value in (None, "") else f"{float(value):.{n}f}"
