import numpy as np, pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
rng=np.random.default_rng(0); n=1_000_000
L=np.clip(rng.lognormal(4.9,0.9,n),2,4000).astype(np.int64); L=(L*201e6/L.sum()).astype(np.int64).clip(2)
off=np.concatenate([[0],np.cumsum(L)]).astype(np.int32)
ids=rng.integers(3,30000,off[-1],dtype=np.int32)
lab=ids.copy(); starts=off[:-1]; 
mask=np.ones(off[-1],np.int8)
for k in range(1): pass
third=(L//3)
idx=np.repeat(starts,third)+ (np.arange(third.sum())-np.repeat(np.cumsum(third)-third,third))
lab[idx]=-100; mask[idx]=0
A=lambda v: pa.ListArray.from_arrays(pa.array(off),pa.array(v))
Dataset(InMemoryTable(pa.table({"input_ids":A(ids),"labels":A(lab)}))).save_to_disk("/tmp/w/big_lab")
Dataset(InMemoryTable(pa.table({"input_ids":A(ids),"completion_mask":A(mask)}))).save_to_disk("/tmp/w/big_mask")
print(off[-1])
