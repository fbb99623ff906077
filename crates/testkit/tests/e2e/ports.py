# A server of a user: says what it was asked, echoes, ticks, and changes protocols.
import http.server
import json
import os
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.headers.get("upgrade") == "reverse":
            return self.reverse()
        if self.path == "/ticks":
            return self.ticks()
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if self.path == "/echo":
            return self.answer(body)
        said = {
            "path": self.path,
            "body": body.decode(),
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "pid": os.getpid(),
        }
        self.answer(json.dumps(said).encode())

    do_POST = do_GET

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def ticks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b"5\r\ntick\n\r\n")
            time.sleep(0.5)
        self.wfile.write(b"0\r\n\r\n")

    def reverse(self):
        self.send_response(101)
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", "reverse")
        self.end_headers()
        for line in self.rfile:
            self.wfile.write(line.rstrip(b"\n")[::-1] + b"\n")
        self.wfile.write(b"bye\n")
        self.close_connection = True

    def log_message(self, *_):
        pass


inner = http.server.ThreadingHTTPServer(("127.0.0.1", 8001), Handler)
threading.Thread(target=inner.serve_forever, daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
