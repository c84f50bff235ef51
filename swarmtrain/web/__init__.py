"""Page of a swarm: its server, its front end in `static/`, and reports made of the same front end."""
