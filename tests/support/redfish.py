"""A Redfish management controller on loopback, over HTTP or HTTPS with a certificate of its own."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Controller(ThreadingHTTPServer):
    """A management controller: `answers` by path (an object, bytes, or what gives one), and what it was asked."""

    def __init__(self, certificate=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {
            "/redfish/v1/Chassis/1": {
                "EnvironmentMetrics": {"@odata.id": "/redfish/v1/Chassis/1/EnvironmentMetrics"},
                "Power": {"@odata.id": "/redfish/v1/Chassis/1/Power"},
            },
            "/redfish/v1/Chassis/1/EnvironmentMetrics": {},
            "/redfish/v1/Chassis/1/Power": {"PowerControl": [{"PowerConsumedWatts": 590}]},
        }
        self.login, self.status, self.headers_seen, self.delay_s = None, 200, [], 0.0
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_port}/redfish/v1/Chassis/1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def environment(self, **metrics):
        self.answers["/redfish/v1/Chassis/1/EnvironmentMetrics"] = metrics

    def handle_error(self, request, client_address):
        pass  # a client that hangs up in a test is meant to


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.headers_seen.append((self.path, self.headers.get("Authorization")))
        time.sleep(server.delay_s)
        allowed = server.login is None or self.headers.get("Authorization") == server.login
        answer = server.answers.get(self.path)
        status = server.status if allowed and answer is not None else 401 if not allowed else 404
        answer = answer() if callable(answer) else answer
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def own_certificate(path: Path) -> Path:
    """A controller's own certificate and key, in one file: for another name than its address."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bmc")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path
