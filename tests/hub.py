"""A stand-in for the Hugging Face hub: serves repositories of datasets and models from a folder over HTTP on loopback.

It answers the requests of `datasets` and `huggingface_hub`: revision, tree, paths-info and files (with ranges); and it fails
on request.
"""
import json
import socket
import struct
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """A server at `url`. `add` creates a dataset repository, `fail` makes requests fail, `requests` lists all requests."""

    def __init__(self, folder: Path):
        self.folder, self.requests = folder, []
        self.faults: list[list] = []
        self.released = threading.Event()  # ends requests that are never answered
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.handle_error = lambda *args: None  # connections are reset on purpose
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, how: str, where: str, times: int = 1, after: int = 0):
        """Makes `times` requests with `where` in their path fail, after the first `after` ones. how: an HTTP status; "cut",
        the connection is reset in the middle of the answer; "away", it is reset before; "silent", there is no answer."""
        self.faults.append([how, where, after, times])

    def fault(self, path: str) -> str | None:
        """How this request has to fail; None if it succeeds."""
        for fault in self.faults:
            how, where, after, times = fault
            if where in path:
                if after > 0:
                    fault[2] -= 1
                elif times > 0:
                    fault[3] -= 1
                    return how
        return None

    def add(self, dataset: str, configs: dict[str, list[list[dict]]]):
        """configs: name -> parquet files, each a list of rows."""
        import pyarrow.parquet  # here, as the tests that run on a GPU machine do not need it
        lines = ["---", "configs:"]
        for name, files in configs.items():
            lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/*.parquet"]
            for i, rows in enumerate(files):
                path = self.folder / dataset / name / f"{i:03}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                columns = list(rows[0]) if rows else ["text"]
                table = pyarrow.table({column: pyarrow.array([row[column] for row in rows], pyarrow.string())
                                       if not rows or isinstance(rows[0][column], str) else [row[column] for row in rows]
                                       for column in columns})
                pyarrow.parquet.write_table(table, path, row_group_size=7)
        (self.folder / dataset / "README.md").write_text("\n".join([*lines, "---", ""]))


def damage_row_group(path: Path, group: int) -> Path:
    """Overwrites the content of a row group of a parquet file; returns `path`."""
    import pyarrow.parquet
    metadata = pyarrow.parquet.read_metadata(path)
    column = metadata.row_group(group).column(metadata.schema.names.index("text"))
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start:start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    return path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_HEAD

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.answer(body.get("paths", []))

    def answer(self, paths: list[str] = ()):
        url = unquote(self.path.split("?")[0]).strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path}")
        self.cut = False
        how = self.hub.fault(unquote(self.path))
        if how == "away":
            return self.hang_up()
        if how == "silent":
            self.hub.released.wait(30)
            return self.hang_up()
        if how == "cut":
            self.cut = True
        elif how:
            return self.send(int(how), b'{"error": "busy"}', {"Retry-After": "1"} if how == "429" else {})
        if url[:2] in (["api", "datasets"], ["api", "models"]):
            dataset, verb, rest = "/".join(url[2:4]), *(url[4:5] or ["revision"]), "/".join(url[6:])
            root = self.hub.folder / dataset
            if not root.exists():
                return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            if verb == "revision":
                return self.send_json({"id": dataset, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
            if verb == "paths-info":
                return self.send_json([self.describe(root, root / path) for path in paths if (root / path).exists()])
            if verb == "tree" and (root / rest).is_dir():
                return self.send_json([self.describe(root, path) for path in sorted((root / rest).rglob("*"))])
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        url = url[url[:1] == ["datasets"]:]
        if url[2:3] == ["resolve"]:
            root = self.hub.folder / url[0] / url[1]
            path = root / "/".join(url[4:])
            if not root.exists():
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send_file(path)
        return self.send(404, b"")

    def describe(self, root: Path, path: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        size = path.stat().st_size if path.is_file() else 0
        return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size,
                "oid": sha1(str(path).encode()).hexdigest()}

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path: Path):
        data = path.read_bytes()
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "Accept-Ranges": "bytes", "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first:last + 1], headers)
        return self.send(200, data, headers)

    def send(self, status: int, data: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:len(data) // 2] if self.cut else data)
        if self.cut:
            self.wfile.flush()
            self.hang_up()

    def hang_up(self):
        """Resets the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
