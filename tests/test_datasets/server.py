"""A server on this machine that can hang up in the middle of an answer."""

import http.server
import threading


class Server:
    """Serves ``content`` at any path, after ``cut`` bytes of an answer (once) it hangs up."""

    def __init__(self, content, cut=None, ranges=True):
        self.requests = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get('Range')
                outer.requests.append(asked)
                start = int(asked.removeprefix('bytes=').removesuffix('-')) if asked and ranges else 0
                if start >= len(content):
                    self.send_response(416)
                    self.send_header('Content-Range', f'bytes */{len(content)}')
                    self.send_header('Content-Length', '0')
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
                self.send_header('Content-Length', str(len(content) - start))
                self.end_headers()
                nonlocal cut
                self.wfile.write(content[start:] if cut is None else content[start : start + cut])
                cut = None

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}/archive.zip'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()
