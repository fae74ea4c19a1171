"""Stand-ins for the metadata services of AWS, GCP and Azure: real HTTP on loopback, the shapes and refusals of the real ones.

`say` sets what an endpoint answers; `requests` has what was asked, as (method, path without query, headers, body).
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class _Service:
    def __init__(self):
        self.values = {}
        self.requests = []
        self.changed = threading.Condition()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.requests.append((self.command, url.path, dict(self.headers.items()), body))
                query = {k: v[-1] for k, v in parse_qs(url.query).items()}
                status, text, headers = service.answer(self.command, url.path, query, self.headers, body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # whoever asked waits no longer

            do_GET = do_PUT = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def say(self, path, value):
        """From now on `path` answers `value`; None: 404."""
        with self.changed:
            self.values[path] = value
            self.changed.notify_all()


class AwsService(_Service):
    """IMDSv2. `forget_tokens` makes those it gave worthless."""

    def __init__(self):
        super().__init__()
        self.tokens = []
        self.valid = set()

    def forget_tokens(self):
        self.valid.clear()

    def answer(self, method, path, query, headers, body):
        if path == "/latest/api/token":
            if method != "PUT":
                return 405, "", {}
            if "X-Forwarded-For" in headers or not headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                return 400, "", {}
            self.tokens.append(f"token-{len(self.tokens)}==")
            self.valid.add(self.tokens[-1])
            return 200, self.tokens[-1], {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "21600"}
        if headers.get("X-aws-ec2-metadata-token") not in self.valid:
            return 401, "<html>401 - Unauthorized</html>", {}
        value = self.values.get(path)
        return (404, "<html>404 - Not Found</html>", {}) if value is None else (200, value, {})


class GcpService(_Service):
    """The metadata server: a flavour header both ways, ETags, requests that wait for a change."""

    def __init__(self):
        super().__init__()
        self.values = {
            "/computeMetadata/v1/instance/": "attributes/\npreempted\n",
            "/computeMetadata/v1/instance/preempted": "FALSE",
            "/computeMetadata/v1/instance/maintenance-event": "NONE",
        }

    def answer(self, method, path, query, headers, body):
        if headers.get("Metadata-Flavor") != "Google" or "X-Forwarded-For" in headers:
            return 403, "Missing Metadata-Flavor:Google header.", {"Metadata-Flavor": "Google"}
        until = time.monotonic() + float(query.get("timeout_sec", 60))
        with self.changed:
            while query.get("wait_for_change") == "true" and self.etag(path) == query.get("last_etag"):
                if not self.changed.wait(max(0.0, until - time.monotonic())):
                    break
            value = self.values.get(path)
            common = {
                "Metadata-Flavor": "Google",
                "ETag": self.etag(path),
                "Server": "Metadata Server for VM",
            }
            return (404, "", common) if value is None else (200, value, common)

    def etag(self, path):
        return f"{hash((path, self.values.get(path))) & 0xFFFFFFFF:08x}"


class AzureService(_Service):
    """The instance's name and the Scheduled Events of its scale set; POST acknowledges and takes the event away."""

    name = "pool_3"

    def __init__(self):
        super().__init__()
        self.events = []
        self.acknowledged = []

    def schedule(self, event_id, kind, not_before, machines=None):
        """Azure's own names; `not_before` as in its documentation, `Mon, 19 Sep 2016 18:29:47 GMT`."""
        self.events.append(
            {
                "EventId": event_id,
                "EventStatus": "Scheduled",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": machines or [self.name],
                "NotBefore": not_before,
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answer(self, method, path, query, headers, body):
        if headers.get("Metadata") != "true" or "X-Forwarded-For" in headers:
            return 400, '{"error": "Bad request. Required metadata header not specified"}', {}
        if "api-version" not in query:
            return 400, '{"error": "Bad request. api-version was not specified"}', {}
        if path == "/metadata/instance/compute/name":
            return 200, self.name, {}
        if path != "/metadata/scheduledevents":
            return 404, '{"error": "Not found"}', {}
        if method == "POST":
            wanted = [r["EventId"] for r in json.loads(body)["StartRequests"]]
            self.acknowledged += wanted
            self.events = [e for e in self.events if e["EventId"] not in wanted]
            return 200, "", {}
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.events}), {}
