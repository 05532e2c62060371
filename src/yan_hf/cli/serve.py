# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf serve`: answer requests over HTTP, in OpenAI's protocol.

POST /v1/completions generates texts; its field suffix fills the gap between prompt and suffix, and stream sends every
solver step's draft. GET /v1/models, /health, /ready and /metrics tell about the service. It runs on Ray Serve, on the
cluster that RAY_ADDRESS names or on one of this machine, until it is interrupted.
"""

import argparse
import time
from dataclasses import fields

from ..serving.engine import Limits
from .common import add_loading, load_with_tokenizer, positive


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=positive, default=8000, help="default: %(default)s")
    parser.add_argument("--model-name", help="what clients call the model (default: the checkpoint's last name)")
    parser.add_argument("--replicas", type=positive, default=1, help="copies of the model (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each (default: %(default)s)")
    group = parser.add_argument_group("limits")
    for limit in fields(Limits):
        help = f"{limit.metadata['help']} (default: {limit.default})"
        group.add_argument(f"--{limit.name.replace('_', '-')}", type=positive, default=limit.default, help=help)


def run(options: argparse.Namespace):
    from ..serving.service import build_application, run_service, serve  # needs Ray

    model, _ = load_with_tokenizer(options)  # so that what is wrong with a checkpoint is said here, in one line
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    choices = {"model_name": options.model_name, "replicas": options.replicas, "num_threads": options.threads}
    choices |= {"device": model.device.type, "dtype": options.dtype, "limits": limits}
    del model
    application = build_application(options.checkpoint, **choices)
    run_service(application, options.host, options.port, options.replicas, options.threads)
    print(f"Answering at http://{options.host}:{options.port}/v1/completions", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
