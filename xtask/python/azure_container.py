"""Makes a container in a stand-in for Azure's blobs: python azure_container.py ENDPOINT ACCOUNT KEY CONTAINER.

The request is signed as «Authorize with Shared Key» asks for, with the standard library alone.
"""

import base64
import datetime
import hashlib
import hmac
import sys
import urllib.error
import urllib.parse
import urllib.request

endpoint, account, key, container = sys.argv[1:]
date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
version = "2021-12-02"
path = urllib.parse.urlparse(endpoint).path
# The verb and eleven standard headers, all empty; then the headers and the resource in their canonical form.
to_sign = (
    "PUT" + "\n" * 12
    + f"x-ms-date:{date}\nx-ms-version:{version}\n"
    + f"/{account}{path}/{container}\nrestype:container"
)
digest = hmac.new(base64.b64decode(key), to_sign.encode(), hashlib.sha256).digest()
request = urllib.request.Request(
    f"{endpoint}/{container}?restype=container",
    method="PUT",
    headers={
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {account}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    },
)
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    sys.exit(f"the container was not made: {error}: {error.read().decode(errors='replace')}")
