from gevent import monkey

monkey.patch_all()  # before anything else is imported

from psycogreen.gevent import patch_psycopg  # noqa: E402

patch_psycopg()  # for psycopg2; psycopg finds gevent out by itself

worker_class = "gevent"
workers = 1
