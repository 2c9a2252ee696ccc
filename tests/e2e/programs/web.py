# SPDX-License-Identifier: BSD-3-Clause
"""nginx with files, uploads, TLS and git: the same configuration on the host and in the guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.programs.house import HOST, House

CONFIG = """
daemon off;
user root;
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log notice;
events {{ worker_connections 512; }}
http {{
  access_log {home}/access.log;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  client_max_body_size 0;
  default_type application/octet-stream;
  # a slow machine is no reason to give up
  client_header_timeout 900;
  client_body_timeout 900;
  send_timeout 900;
  keepalive_timeout 900;
  fastcgi_read_timeout 900;
  server {{
    listen {plain};
    {tls}
    root {home}/www;
    location /up/ {{ dav_methods PUT; }}
    location /git/ {{
      include /etc/nginx/fastcgi_params;
      fastcgi_param SCRIPT_FILENAME /usr/lib/git-core/git-http-backend;
      fastcgi_param GIT_PROJECT_ROOT {home}/git;
      fastcgi_param GIT_HTTP_EXPORT_ALL "";
      fastcgi_param REMOTE_USER somebody;
      fastcgi_param PATH_INFO $uri;
      fastcgi_pass unix:{home}/fcgi.sock;
      rewrite ^/git/(.*) /$1 break;
    }}
  }}
}}
"""
TLS = "listen {tls} ssl; http2 on; ssl_certificate {home}/cert.pem; ssl_certificate_key {home}/key.pem;"


def config(home: Path | str, plain: str, tls: str = "") -> str:
    """``plain`` and ``tls``: where to listen, ADDRESS:PORT. Everything else lies in the folder ``home``."""
    return CONFIG.format(home=home, plain=plain, tls=TLS.format(tls=tls, home=home) if tls else "")


@dataclass(frozen=True)
class Web:
    """nginx on the host. ``url`` and ``secure`` are what the guest asks for."""

    home: Path
    url: str
    secure: str


@contextlib.contextmanager
def web_of_the_host(house: House, name: str = "web") -> Iterator[Web]:
    """nginx in a folder ``name``, with TLS and git's smart HTTP."""
    home = house.folder / name
    for name in ("www/up", "git"):
        (home / name).mkdir(parents=True)
    house.host(
        f"openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=host.test -days 2 "
        f"-addext subjectAltName=DNS:host.test,IP:{HOST} -keyout {home}/key.pem -out {home}/cert.pem"
    )
    house.give(home / "cert.pem")
    plain, tls = house.port(), house.port()
    (home / "nginx.conf").write_text(config(home, f"{house.here}:{plain}", f"{house.here}:{tls}"))
    with (
        house.host_start("fcgiwrap", f"fcgiwrap -s unix:{home}/fcgi.sock"),
        house.host_server("nginx", f"nginx -p {home} -e {home}/error.log -c {home}/nginx.conf", plain),
    ):
        yield Web(home, f"http://host.test:{plain}", f"https://host.test:{tls}")
