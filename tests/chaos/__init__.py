"""A ledger of what an application was told, compared with what its database holds after many disturbances.

Threads transfer, claim, count, lock, find or create, upsert and hook while their connections are killed, cut, half
closed, cut short, stalled and delayed, the server restarts, processes fork, and threads are interrupted. Each
operation has a token and writes rows that carry it. Afterwards each acknowledged operation must be there in
whole, each failed one absent in whole, and the application left as it was.

    python -m tests.chaos --seconds 60 --driver psycopg
"""
