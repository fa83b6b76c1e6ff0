"""Agents that share one Azure OpenAI deployment, and the kit that keeps them within its quota.

    python -m examples.multi_agent                                  # bare client against the kit, simulated
    python -m examples.multi_agent --question "What is 2**64 - 1?"  # your own question
    python -m examples.multi_agent --processes 4                    # four processes that share one quota

It needs no account: the simulator answers, with simple rules in place of a model. The tools are real. Set
AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY and AZURE_OPENAI_DEPLOYMENT, and the same program talks to Azure with the
quota of `rate-limiting.env`; set ADX_CLUSTER and ADX_DATABASE, and it queries your cluster.

How to layer, in the order of the files:

1. `model_calls.py`: one decorator, around the one function that calls the model:

       @resilient("azure-openai", agent="MathAgent")
       async def call_model(**request):
           return await client.chat.completions.create(model="gpt-4o", **request)

   The name stands for the deployment: all who use it share one quota and one circuit. The agent is an account: what it
   spends is counted under its own name. The client is made with `max_retries=0`, so that there is one retry loop.
2. `agents.py`: agents take that function, and know nothing of quotas. A decorator around a whole agent would repeat its
   tools and its earlier calls for each retry, and hold a slot while it computes.
3. `system.py`: puts them together, and asks as many questions at once as it likes: who must wait, waits in the call.

`calculator.py` and `telemetry.py` are the tools, `service.py` knows where the model is, `comparison.py` measures, and
`processes.py` starts many, which share the quota through RESILIENCE_STORE, or through a server that it starts.
"""
