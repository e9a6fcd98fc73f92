"""An HTTP server with OpenAI's interface over one engine. `app.py` has the routes, docs/server.md the interface."""
