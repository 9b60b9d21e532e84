"""Temporary probe: the step on the device against the fp32 reference."""
import torch, sys, time
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.weights import WeightPlan
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Plan
from tradespace.model.transformer import Transformer
from tradespace.kernels.view import StepBatch
from tradespace.build_cuda import build_on_device
from tradespace.engine.request import SamplingParams
from tradespace.units import GiB
cfg=dict(model_type="llama",architectures=["LlamaForCausalLM"],hidden_size=512,intermediate_size=1024,num_hidden_layers=4,num_attention_heads=8,num_key_value_heads=2,vocab_size=2000,max_position_embeddings=512,rms_norm_eps=1e-5,rope_theta=10000.0,hidden_act="silu",tie_word_embeddings=False)
spec=model_spec_from_config(cfg,"small")
for fmt,store in (("bf16","bf16"),("int8","int8"),("int4-g128","fp8"),("nf4","bf16"),("fp8","bf16"),("w8a8","bf16"),("fp8-a8","fp8")):
    plan=Plan(model="small",weights=WeightPlan(default=fmt,exceptions={"embed":"bf16"},layout="cuda"),kv=KVPlan(store=store,block_size=16),attention="paged",linear="cuda",max_sequences=80,max_context=384,step_tokens=512,kv_tokens=80*384,device="h100-80gb",memory_bytes=4*GiB)
    b=build_on_device(spec,None,plan,tokenizer=None)
    m=b.transformer
    ref=Transformer(spec,WeightPlan(default="fp32"),attention="sdpa",linear="torch",max_context=384,device="cuda")
    for n,w in ref.named_modules():
        if hasattr(w,"set_rows"): w.set_rows(slice(0,w.shape[0]), m.get_submodule(n).dense_rows(0,w.shape[0]).float())
    for n,p_ in ref.named_parameters():
        if n.endswith("norm.weight"): p_.fill_(1.0)
    g=torch.Generator().manual_seed(0)
    bad=0; worst=0.0; total=0
    for B in (1,3,40,80):
        prompts=[torch.randint(0,2000,(int(torch.randint(1,200,(1,),generator=g)),),generator=g).tolist() for _ in range(B)]
        outs=b.engine.generate(prompts,SamplingParams(temperature=0.0,max_tokens=12,ignore_eos=True))
        for pr,o in list(zip(prompts,outs))[:12]:
            ids=torch.tensor(pr+list(o.output_ids),device="cuda")
            with torch.inference_mode():
                lg=ref.logits(ref.forward(ids,torch.arange(len(ids),device="cuda"),StepBatch.packed([len(ids)],device="cuda")))
            lg=lg[len(pr)-1:-1]; chosen=torch.tensor(o.output_ids,device="cuda")
            gap=(lg.max(1).values-lg.gather(1,chosen[:,None])[:,0])
            worst=max(worst,gap.max().item()); total+=len(chosen); bad+=int((gap>0.05*lg.std()).sum())
    lp=b.engine.generate(prompts[:3],SamplingParams(temperature=1.0,top_p=0.9,top_k=50,seed=1,max_tokens=8,ignore_eos=True,logprobs=2))
    lq=b.engine.generate(prompts[:3],SamplingParams(temperature=1.0,top_p=0.9,top_k=50,seed=1,max_tokens=8,ignore_eos=True))
    print("CHECK",fmt,store,"tokens",total,"off",bad,"worst gap",round(worst,4),"std",round(lg.std().item(),3),"drawn alike",[a.output_ids==c.output_ids for a,c in zip(lp,lq)],"used",b.engine.scheduler.allocator.num_used,flush=True)
    del b,m,ref; import gc; gc.collect(); torch.cuda.empty_cache(); torch.cuda.set_per_process_memory_fraction(1.0)
