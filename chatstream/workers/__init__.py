"""Our gunicorn workers: small subclasses of gunicorn's, whose connections do not linger.

For `worker_class`: `chatstream.workers.gthread.ThreadWorker` and
`chatstream.workers.gevent.GeventWorker`. They bound how long a client may take for its request, and
what a client does or leaves undone meanwhile costs no thread.
"""
