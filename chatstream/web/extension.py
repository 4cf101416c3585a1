"""ChatStream, the Flask extension: mounts the routes, and wires an app's hooks to its `Service`."""

from __future__ import annotations

import os
from collections import Counter

from flask import Flask

from chatstream import bus, cli
from chatstream.bus.messages import digest
from chatstream.errors import ConfigError, RequestTimeout
from chatstream.service.hooks import Admin, Identify, Prepare
from chatstream.service.service import Service
from chatstream.settings.table import Settings
from chatstream.web import blueprint, cors, metrics, replies
from chatstream.web.tokens import CHALLENGE, Tokens
from chatstream.workers import draining


class ChatStream:
    """Mounts the chat routes in a Flask app.

        app = Flask(__name__)
        ChatStream(app, identify=lambda: current_user.get_id())

    Nothing of an app is kept here; `app.extensions["chatstream"]` has its `Service`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        identify: Identify | None = None,
        admin: Admin | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        """
        Args:
            app: The app to mount in, or None and a later `init_app`.
            identify: See `Identify`. Without it, and without CHATSTREAM_TOKENS, all callers are one
                owner.
            admin: See `Admin`. Without it nobody is.
            prepare: See `Prepare`. Without it the provider gets what the caller asks.
        """
        self._identify = identify
        self._admin = admin
        self._prepare = prepare
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Reads the settings and mounts the routes.

        Raises:
            ConfigError: A setting is wrong; the message names it.
        """
        settings = Settings.load(app.config, os.environ)
        bus.check(settings)
        service = Service(settings, self._identify, _name_of(app, settings), app)
        service.prepare = self._prepare
        service.admin = self._admin
        self._use_tokens(service)
        app.extensions["chatstream"] = service
        draining.enrol(service)
        draining.follow_signals()
        app.before_request(service.join)  # where no worker of ours has called it
        app.before_request(draining.notice_end)
        app.register_error_handler(RequestTimeout, replies.timed_out)
        routes = blueprint.blueprint(settings)
        if settings.metrics is not None:
            metrics.mount(settings.metrics, routes, app, service)
        app.register_blueprint(routes)
        app.cli.add_command(cli.group)
        cors.allow(app, settings)

    def _use_tokens(self, service: Service) -> None:
        """Has the settings' tokens say who may, where there are any."""
        settings = service.settings
        if not settings.tokens and not settings.admin_tokens:
            return
        if self._identify is not None or self._admin is not None:
            raise ConfigError(
                "CHATSTREAM_TOKENS and CHATSTREAM_ADMIN_TOKENS say who may use a service without"
                " `identify` and `admin`, and this app has these. Remove the one or the other."
            )
        tokens = Tokens(settings)
        service.identify, service.admin = tokens.identify, tokens.is_admin
        service.challenge = CHALLENGE


_apps: Counter[str] = Counter()


def _name_of(app: Flask, settings: Settings) -> str:
    """An app's name on the bus. Two that look the same differ by the order of their making."""
    name = digest(app.import_name, settings.url_prefix)[:8]
    _apps[name] += 1
    return f"{name}{_apps[name]}"
