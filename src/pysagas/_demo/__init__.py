"""A saga against a real database: run it, break it, kill it, and see everything restored.

``python -m pysagas`` places an order in a small shop: a SQLite file, a directory of invoices, and a
warehouse that is told of orders over HTTP. No transaction covers all three; the saga does.

Read ``_shop``, then ``_order`` with the steps and the saga, then ``_command``. They use nothing of
pysagas but its public names.
"""

from ._command import main
from ._order import ORDER, STEPS, app
from ._shop import Order, Shop, look, open_shop

__all__ = ["ORDER", "STEPS", "Order", "Shop", "app", "look", "main", "open_shop"]
