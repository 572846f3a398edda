"""The built-in reward `llm_judge`: a language model behind an OpenAI-compatible address scores or ranks completions.

`reward` is what a config names, `question` writes the request and reads the answer, `service` sends it with retries and a cache,
`http` makes one HTTP request.
"""
