"""What the server says of its own interface."""


def test_the_interface_describes_itself(ask):
    async def steps(post, get):
        return (await get("/openapi.json")).json(), await get("/docs"), await get("/"), await get("/nowhere")

    interface, docs, page, nowhere = ask(steps)
    body = interface["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"history", "K", "exclude_seen", "allow", "deny", "where"}
    assert {"200", "422", "500", "503"} <= set(interface["paths"]["/recommend"]["post"]["responses"])
    paths = {"/recommend", "/items", "/options", "/health", "/ready", "/metrics", "/reload"}
    assert set(interface["paths"]) == paths
    assert nowhere.status_code == 404 and nowhere.json() == {"detail": ["Not Found"]}
    for shown in (page, docs):
        assert shown.status_code == 200 and "default-src 'none'" in shown.headers["Content-Security-Policy"]
        assert "://" not in shown.text and "src=" not in shown.text  # nothing from elsewhere
