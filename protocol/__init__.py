"""What both sides agree on: types, signed envelopes, wire schema, limits, errors.

Imports without torch or numpy, so that a status page, a signing tool or a log reader needs neither.
"""
