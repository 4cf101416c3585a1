# The standalone service, behind a proxy that speaks TLS (deploy/nginx.conf).
#
#   docker build -t chatstream .
#   docker run -p 127.0.0.1:8000:8000 --env-file deploy/chatstream.env \
#       --ulimit nofile=65536 --stop-timeout 40 chatstream
#
# A stream takes five descriptors. A stop drains for CHATSTREAM_DRAIN, 25 s, where Docker would kill
# after 10. With a quota of CPUs say WEB_CONCURRENCY, too: the cores that are seen are the host's.

FROM python:3.12-slim AS build
WORKDIR /opt/chatstream
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY chatstream chatstream
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --requirement requirements.txt '.[cors,gevent,json,metrics,redis]'

FROM python:3.12-slim
WORKDIR /opt/chatstream
COPY --from=build /opt/chatstream/.venv .venv
COPY wsgi.py gunicorn.conf.py ./
ENV PATH=/opt/chatstream/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CHATSTREAM_BIND=0.0.0.0:8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
# The exec form: gunicorn itself gets the signal, and no shell. Its heartbeat is in memory, since a
# container's disk may be slow.
CMD ["gunicorn", "--no-control-socket", "--worker-tmp-dir", "/dev/shm", "wsgi:app"]
