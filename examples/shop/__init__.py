"""A shop: customers, products with tags, orders, an audit table, and a queue of jobs."""
