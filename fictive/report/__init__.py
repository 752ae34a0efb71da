"""What a request did with its database: collected where statements are sent, and shown in several ways."""
