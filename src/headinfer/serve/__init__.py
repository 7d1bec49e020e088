"""A server over one model: documents are read into sessions, and requests of several clients are answered.

The core (`Service`) knows no HTTP. The application over it is in app.py.
"""
