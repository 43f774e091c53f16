"""What the transports for httpx and httpx2 share. The two packages have the same names but classes of their own, so
everything here works on a ``Binding`` to one of them."""
